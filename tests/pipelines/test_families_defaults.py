"""What a model's own pipeline does when it is told nothing: read from its signatures, and followed or said."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from audit.base.errors import AuditError
from audit.run.run import Run
from audit.scores.model import load_run_model
from pipelines import DiffusionModel, FirstStepScorer, MaskSource, MitigatedPipeline, ModelError, find_model, load
from pipelines.families import FAMILIES
from pipelines.families.defaults import CLEANED, call_default, cleans_captions, encode_defaults, published_pipeline
from tests.command import be_audit
from tests.tiny import SCHEDULE, save_model

DIRTY = "A Cat #123 at https://example.com/a"
CLEANS = {"pixart": True, "pixart_alpha": True, "if": True, "sana": False}
"""Kinds whose pipeline can clean captions, and whether it does when it is told nothing."""
GUIDED = {"pixart": "clean_caption", "sana": "complex_human_instruction", "sd3": "max_sequence_length"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("defaults")
    return {kind: save_model(kind, root / kind) for kind in (*CLEANS, "sd1", "sd3", "distilled")}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.csv"
    path.write_text("TEXT\na cat\n")
    return path


def opened(folders: dict[str, Path], kind: str) -> DiffusionModel:
    return load(find_model(str(folders[kind])), "cpu", "float32")


def install_cleaners(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> None:
    """As where bs4 and ftfy are installed: diffusers looks for both in the pipeline's module. URLs and #123 go."""
    module = importlib.import_module(type(pipeline).__module__)
    for place in (module, diffusers.utils):
        for name in ("is_bs4_available", "is_ftfy_available"):
            monkeypatch.setattr(place, name, lambda: True)
    clean = lambda _, caption: re.sub(r"#\d+|https?:\S+", "", caption).lower().strip()  # noqa: E731
    monkeypatch.setattr(type(pipeline), "_clean_caption", clean)


def ids_of(pipeline: Any, call: Any) -> list[list[int]]:
    """Ids its text encoder is given during a call."""
    seen: list[list[int]] = []
    handle = pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend((args[0] if args else kwargs["input_ids"]).tolist()), with_kwargs=True
    )
    call()
    handle.remove()
    return seen


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLEANS)
@pytest.mark.parametrize("installed", (True, False))
def test_a_caption_is_the_prompt_its_pipeline_makes_of_it(
    folders: dict[str, Path], kind: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleaned where the call cleans and can: the same ids, and counted as they are."""
    model = opened(folders, kind)
    if installed:
        install_cleaners(monkeypatch, model.pipeline)
    takes = inspect.signature(model.pipeline.__call__).parameters
    options = {"use_resolution_binning": False} if "use_resolution_binning" in takes else {}
    own = ids_of(model.pipeline, lambda: model.pipeline(DIRTY, num_inference_steps=2, output_type="pt", **options))
    ours = ids_of(model.pipeline, lambda: model.encode([DIRTY]))
    assert ours == own[:1]
    cleaned = CLEANS[kind] and installed
    assert cleans_captions(model.pipeline) == cleaned
    short, long = model.encode(["a cat  at"]).num_tokens, model.encode([DIRTY]).num_tokens
    assert bool(long == short) == cleaned


@pytest.mark.parametrize("kind", ("pixart", "if"))
def test_what_is_cleaned_is_no_longer_than_fills_the_encoder(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of diffusers' patterns take time as the square of a caption: minutes for 65,536 letters without a blank."""
    model, long = opened(folders, kind), "#1 " * 1300 + "a cat" + " " * 10_000
    assert not model.encode([long.replace("#1 ", "")]).truncated
    install_cleaners(monkeypatch, model.pipeline)
    seen: list[int] = []
    clean = type(model.pipeline)._clean_caption
    monkeypatch.setattr(
        type(model.pipeline), "_clean_caption", lambda self, text: seen.append(len(text)) or clean(self, text)
    )
    whole, part = model.encode(["a cat"]), model.encode([long])
    assert torch.equal(whole.hidden, part.hidden) and part.num_tokens == whole.num_tokens
    assert (whole.truncated.item(), part.truncated.item()) == (False, True) and max(seen) == CLEANED


@pytest.mark.parametrize("kind", GUIDED)
def test_every_option_of_encode_prompt_has_the_calls_default(folders: dict[str, Path], kind: str) -> None:
    found, pipeline = encode_defaults(opened(folders, kind).pipeline), published_pipeline(find_class(folders[kind]))
    assert GUIDED[kind] in found and "prompt" not in found and "self" not in found
    for name, value in found.items():
        assert name == "clean_caption" or value == call_default(pipeline, name)


def find_class(folder: Path) -> str:
    return str(json.loads((folder / "model_index.json").read_text())["_class_name"])


@pytest.mark.parametrize("given", ({}, {"clean_caption": False}, {"clean_caption": True, "max_sequence_length": 20}))
def test_a_mitigated_pipeline_takes_every_option_of_its_prompts(
    folders: dict[str, Path], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = opened(folders, "pixart").pipeline
    install_cleaners(monkeypatch, pipe)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "use_resolution_binning": False, **given}
    plain = pipe(DIRTY, generator=torch.Generator().manual_seed(1), **options)
    wrapped = MitigatedPipeline(pipe, threshold=1e9, target=1.0, mask="energy")
    found = wrapped(DIRTY, generator=torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(torch.from_numpy(found.images), torch.from_numpy(plain.images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="prompt_attention_mask: MitigatedPipeline makes the embeddings itself"):
        wrapped(DIRTY, prompt_attention_mask=torch.ones(1, 300))


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_a_familys_guidance_is_its_pipelines() -> None:
    for family in FAMILIES:
        assert call_default(published_pipeline(family.pipeline_class), "guidance_scale") == family.guidance_default


@pytest.fixture(scope="module")
def lcm(folders: dict[str, Path]) -> Path:
    """A latent consistency model: the distilled model as its own pipeline saves it."""
    parts = opened(folders, "distilled").pipeline.components
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
    folder = folders["distilled"].parent / "lcm"
    diffusers.LatentConsistencyModelPipeline(
        **parts,
        scheduler=diffusers.LCMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_a_latent_consistency_model_has_its_own_guidance_and_few_steps(
    lcm: Path, captions: Path, tmp_path: Path
) -> None:
    words = ("scan", captions, "--model", lcm, "--device", "cpu", "--dry-run", "-o", tmp_path / "run")
    done = be_audit(*words, "--steps", 1)
    assert done.code == 0 and "--steps" not in done.err, done
    assert "--guidance-scale 8.5 is what LatentConsistencyModelPipeline takes by itself" in done.err
    assert "--guidance-scale" not in be_audit(*words, "--guidance-scale", 8.5).err


def test_a_wrapped_pipeline_is_triggered_at_its_own_guidance(lcm: Path) -> None:
    pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(lcm)
    pipe.set_progress_bar_config(disable=True)
    wrapped = MitigatedPipeline(pipe, threshold=1e9, target=1.0)
    scores = {}
    for scale in (None, 8.5, 7.5):
        options = {} if scale is None else {"guidance_scale": scale}
        found = wrapped("a cat", generator=torch.Generator().manual_seed(1), num_inference_steps=1, **options)
        scores[scale] = float(found.mitigation.score[0])
    assert scores[None] == scores[8.5] != scores[7.5]


# --- what a command says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "code", "said"),
    [
        (1, 2, "Error: --steps 1: sampling begins at timestep 1, where the model expects 100% of the variance"),
        (1000, 2, "its scheduler's steps_offset 1 puts the first of 1000 steps at timestep 1000, beyond its last, 999"),
        (4, 0, "--steps 4: sampling begins at timestep 751, where the model expects 6% of the variance to be a pict"),
        (50, 0, ""),
    ],
)
def test_steps_that_begin_far_from_noise_are_said_or_refused(
    folders: dict[str, Path], captions: Path, tmp_path: Path, steps: int, code: int, said: str
) -> None:
    run = tmp_path / "run"
    done = be_audit("scan", captions, "--model", folders["sd1"], "--device", "cpu", "--steps", steps, "-o", run)
    assert done.code == code and said in done.err, done
    assert (said != "") == ("--steps" in done.err)
    if code:
        assert len(done.err.splitlines()) == 1 and not run.exists()


def test_a_start_token_that_prompts_have_not_is_refused(
    folders: dict[str, Path], captions: Path, tmp_path: Path
) -> None:
    layer = "transformer_blocks.0.attn2"
    words = ("scan", captions, "-o", tmp_path / "run", "--device", "cpu", "--mask-layers", layer, "--mask-token", "bos")
    done = be_audit(*words, "--model", folders["pixart"])
    said = "Error: --mask-token bos: this model's prompts have no start token: give eos or padding\n"
    assert (done.code, done.err) == (2, said)
    with pytest.raises(ModelError, match="bos: this model's prompts have no start token"):
        FirstStepScorer(opened(folders, "pixart"), MaskSource(token="bos", layers=(layer,)))
    assert be_audit(*words, "--model", folders["sana"], "--dry-run").code == 0  # whose prompts begin with one


@pytest.mark.parametrize("kind", CLEANS)
def test_a_pipeline_that_cannot_clean_here_is_said(
    folders: dict[str, Path], captions: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("scan", captions, "--model", folders[kind], "--device", "cpu", "--dry-run", "-o", tmp_path / "run")
    monkeypatch.setattr(diffusers.utils, "is_bs4_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_ftfy_available", lambda: False)
    assert ("pip install ftfy for prompts like its own" in be_audit(*words).err) == CLEANS[kind]


def test_a_run_goes_on_only_where_its_captions_are_cleaned_as_before(
    folders: dict[str, Path], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("scan", captions, "--model", folders["pixart"], "--device", "cpu", "-o", tmp_path / "run")
    with monkeypatch.context() as there:
        install_cleaners(there, opened(folders, "pixart").pipeline)
        assert be_audit(*words).code == 0
        assert be_audit(*words).code == 0
    done = be_audit(*words)
    assert done.code == 2 and "clean_captions: True -> False" in done.err.replace("true", "True"), done
    with pytest.raises(AuditError, match=r"its captions were cleaned .*: install beautifulsoup4 and ftfy, or scan"):
        load_run_model(Run.open(str(tmp_path / "run")), "cpu")  # as every worker and later stage does


@pytest.mark.parametrize("command", ("score", "mitigate"))
def test_one_prompt_is_told_of_few_steps_too(folders: dict[str, Path], tmp_path: Path, command: str) -> None:
    words = (command, "--prompt", "a cat", "--model", folders["sd1"], "--device", "cpu", "-o", tmp_path / "x.png")
    for steps, said in ((1, "Error: --steps 1: sampling begins"), (1000, "steps_offset 1 puts the first of 1000")):
        done = be_audit(*words, "--steps", steps)
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done
    done = be_audit(*words, "--steps", 3)
    assert done.code == 0 and "--steps 3: sampling begins at timestep 667" in done.err, done
