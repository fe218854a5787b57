"""Models found, refused by name before anything is loaded, fingerprinted, and asked for embeddings."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import ModelError, find_model, load
from pipelines.loading import full_mantissas, resolve_dtype, slow_dtype
from tests.reference import Reference
from tests.tiny import SIZE

CAPTIONS = ["a red house", "", "a much too long text " * 30, "cat <|endoftext|> dog"]


@pytest.fixture
def copy(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder to be spoilt."""
    return Path(shutil.copytree(model_folders["sd1"], tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("kind", ("sd1", "sd2", "sdxl", "testbed"))
def test_embeddings_and_token_places(model_folders: dict[str, Path], kind: str) -> None:
    """Where end-of-text is depends on the padding (SD1 pads with it, SD2 with another id): always the first."""
    model, reference = load(find_model(str(model_folders[kind])), "cpu", "float32"), Reference(model_folders[kind])
    found = model.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        expected = reference.encode(caption)
        assert int(found.eos_positions[row]) == expected.eos, caption
        assert (int(found.num_tokens[row]), bool(found.truncated[row])) == (expected.num_tokens, expected.truncated)
        if caption or not reference.xl:
            torch.testing.assert_close(found.hidden[row], expected.hidden[0], rtol=1e-4, atol=1e-5)
        if reference.xl and caption:
            assert expected.pooled is not None
            pooled = found.conditions["text_embeds"][row]
            torch.testing.assert_close(pooled, expected.pooled[0], rtol=1e-4, atol=1e-5)
    empty = model.encode_empty()
    torch.testing.assert_close(empty.hidden[0], reference.encode("").hidden[0], rtol=1e-4, atol=1e-5)
    assert int(found.eos_positions[2]) == found.hidden.shape[1] - 1  # cut: end-of-text is the last token


def test_noise_bank_can_be_made_by_anyone(model_folders: dict[str, Path]) -> None:
    model = load(find_model(str(model_folders["sd1"])), "cpu")
    expected = torch.randn((3, 4, SIZE, SIZE), generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(model.noise_bank(3, 7), expected)
    assert torch.equal(model.noise_bank(1, 7), expected[:1])  # a larger bank begins with the smaller one


def test_timesteps_begin_below_the_last_training_step(model_folders: dict[str, Path]) -> None:
    model = load(find_model(str(model_folders["sd1"])), "cpu")
    levels = model.levels(50)
    assert [int(level.timestep) for level in levels] == list(range(981, 0, -20))
    assert model.schedule.scheduler.config.clip_sample is False
    assert model.schedule.sigma_max == pytest.approx(14.6, abs=0.05)
    assert [level.next_noise for level in levels[:-1]] == [level.noise for level in levels[1:]]
    assert all(level.signal**2 + level.noise**2 == pytest.approx(1) for level in levels)


def test_pictures_are_decoded_to_the_unit_range(model_folders: dict[str, Path]) -> None:
    model = load(find_model(str(model_folders["sd1"])), "cpu")
    image = model.decode(30 * model.noise_bank(2, 0))
    assert image.shape == (2, 3, *model.image_size) and image.dtype == torch.float32
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)


def test_weights_hash_follows_weights_and_settings_alone(copy: Path) -> None:
    before = find_model(str(copy)).weights_sha256()
    (copy / "README.md").write_text("a card")
    assert find_model(str(copy)).weights_sha256() == before
    seen = {before}
    for part in ("unet", "vae", "text_encoder"):
        weights = next((copy / part).glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        seen.add(find_model(str(copy)).weights_sha256())
    edit(copy / "scheduler" / "scheduler_config.json", beta_end=0.013)
    seen.add(find_model(str(copy)).weights_sha256())
    assert len(seen) == 5


@pytest.mark.parametrize(
    "architecture, reason",
    [
        ("FluxPipeline", "takes packed latents"),
        ("QwenImagePipeline", "put into a template"),
        ("KandinskyPipeline", "no family of be-audit reads it"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str, reason: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": architecture}))
    with pytest.raises(ModelError, match=f"{architecture} is not supported: .*{reason}"):
        find_model(str(tmp_path))


def spoil_unet(copy: Path) -> None:
    shutil.rmtree(copy / "unet")


def spoil_index(copy: Path) -> None:
    (copy / "model_index.json").write_text("{")


def spoil_all(copy: Path) -> None:
    (copy / "model_index.json").unlink()


def spoil_channels(copy: Path) -> None:
    edit(copy / "unet" / "config.json", in_channels=9)


def spoil_attention(copy: Path) -> None:
    edit(copy / "unet" / "config.json", down_block_types=["DownBlock2D", "DownBlock2D"])


def spoil_config(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("not json")


def drop_config(copy: Path) -> None:
    (copy / "unet" / "config.json").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_unet, "no unet/"),
        (spoil_index, "model_index.json cannot be read"),
        (spoil_all, "no model_index.json"),
        (spoil_channels, "inpainting"),
        (spoil_attention, "no cross-attention in its down path"),
        (spoil_config, "unet/config.json cannot be read"),
        (drop_config, "unet/config.json cannot be read"),
    ],
)
def test_spoilt_folders_are_refused_before_loading(copy: Path, spoil: Any, message: str) -> None:
    spoil(copy)
    with pytest.raises(ModelError, match=message) as refused:
        find_model(str(copy))
    assert str(copy) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ("./nothing-here", "/no/such/model", "no-owner", "a/b/c", __file__))
def test_names_that_are_no_model(name: str) -> None:
    with pytest.raises(ModelError, match=r"give a .*diffusers folder or a hub id"):
        find_model(name)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prediction_type": "sample"}, "prediction type is 'sample'"),
        ({"rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"}, "ends without signal"),
        ({"beta_schedule": "laplace", "_class_name": "DDPMScheduler"}, "beta_schedule is 'laplace'"),
        ({"use_flow_sigmas": True, "_class_name": "DPMSolverMultistepScheduler"}, "sets use_flow_sigmas to True"),
        ({"_class_name": "EDMEulerScheduler"}, "its scheduler is EDMEulerScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "its scheduler is ScoreSdeVeScheduler"),
    ],
)
def test_schedules_without_these_scores_are_refused(copy: Path, settings: dict[str, Any], message: str) -> None:
    edit(copy / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(ModelError, match=message) as refused:
        find_model(str(copy))  # before any weights are read
    assert str(copy) in str(refused.value)


def test_weights_that_cannot_be_read(copy: Path) -> None:
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as refused:
        load(find_model(str(copy)), "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ("cuda:99", "gpu", "cuda:x"))
def test_devices_that_are_not_there(model_folders: dict[str, Path], device: str) -> None:
    with pytest.raises(ModelError, match=f"^{device}: ") as refused:
        load(find_model(str(model_folders["sd1"])), device)
    assert refused.value.about == "device"


def test_unknown_dtype(model_folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="float64: give auto"):
        load(find_model(str(model_folders["sd1"])), "cpu", "float64")


@pytest.mark.parametrize(
    ("words", "dtype", "device", "said"),
    [
        ("flags : fpu avx512f", "bfloat16", "cpu", True),
        ("flags : fpu avx512f avx512_bf16", "bfloat16", "cpu", False),
        ("flags : fpu avx512f avx512_bf16", "float16", "cpu", True),
        ("Features : fp asimd fphp bf16", "float16", "cpu", False),
        ("flags : fpu", "float32", "cpu", False),
        ("flags : fpu", "auto", "cpu", False),
        ("flags : fpu", "bfloat16", "cuda", False),
        ("flags : fpu avx512f avx512_bf16 avx512_fp16", "float8", "cpu", True),
        (None, "bfloat16", "cpu", False),
    ],
)
def test_half_precision_that_a_cpu_has_no_instructions_for_is_said(
    words: str | None, dtype: str, device: str, said: bool, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if words is not None:
        cpuinfo.write_text(f"processor : 0\n{words}\n")
    assert slow_dtype(dtype, torch.device(device), cpuinfo).startswith(f"{dtype}: this CPU") == said


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_float32_is_not_rounded_on_gpus(model_folders: dict[str, Path], dtype: str) -> None:
    """torch's default has cuDNN's convolutions in TF32; a half-precision model's VAE may decode in float32, too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full_mantissas()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    load(find_model(str(model_folders["sd1"])), "cpu", dtype)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_auto_is_no_half_precision_but_on_cuda(device: str) -> None:
    assert resolve_dtype("auto", torch.device(device)) == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sd1", "sd2", "sdxl"))
def test_bfloat16_is_close(model_folders: dict[str, Path], kind: str) -> None:
    """Half precision in the network, float32 in the reductions: same order of scores, not the same digits."""
    from pipelines import FirstStepScorer

    folder = find_model(str(model_folders[kind]))
    exact, rough = (FirstStepScorer(load(folder, "cpu", dtype))(CAPTIONS[:1]) for dtype in ("float32", "bfloat16"))
    assert rough.scores["magnitude"].dtype == np.float32
    np.testing.assert_allclose(rough.scores["magnitude"], exact.scores["magnitude"], rtol=0.2)
