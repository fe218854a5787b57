"""The contract of a family: every one samples, measures, decodes and is watched as diffusers' own pipeline of it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import (
    DiffusionModel,
    FirstStepScorer,
    MaskSource,
    MitigatedPipeline,
    Mitigator,
    ModelError,
    TrajectorySampler,
    find_model,
    load,
)
from pipelines.families import Sana
from pipelines.model import Embeddings
from tests.tiny import FAMILIES, save_model

CAPTIONS = ["a red cat", "two dogs on a long hill"]
STEPS, GUIDANCE, NOISE_SEED = 4, 5.0, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionModel]:
    root = tmp_path_factory.mktemp("families")
    return {kind: load(find_model(str(save_model(kind, root / kind))), "cpu", "float32") for kind in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, DiffusionModel]) -> DiffusionModel:
    return models[request.param]


def theirs(model: DiffusionModel, latents: torch.Tensor, output_type: str) -> Any:
    """diffusers' own pipeline from the same noise, by the scheduler that samples as be-audit does."""
    pipeline = model.pipeline
    before, pipeline.scheduler = (
        pipeline.scheduler,
        type(model.schedule.scheduler).from_config(model.schedule.scheduler.config),
    )
    if isinstance(pipeline, diffusers.IFPipeline):  # whose call draws the noise, and asks for pixels by another name
        pipeline.scheduler.register_to_config(variance_type="fixed_small")  # DDIM has no use for the learned one
        optional_noise = {"generator": torch.Generator("cpu").manual_seed(NOISE_SEED)}
        output_type = "pt" if output_type == "latent" else output_type
    else:
        optional_noise = {"latents": (latents / model.schedule.noise_scale).clone()}
    pipeline.set_progress_bar_config(disable=True)
    optional = {"use_resolution_binning": False, "clean_caption": False, "eta": 0.0}
    takes = inspect.signature(pipeline.__call__).parameters
    try:
        return pipeline(
            CAPTIONS,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type=output_type,
            **optional_noise,
            **{name: value for name, value in optional.items() if name in takes},
        ).images
    finally:
        pipeline.scheduler = before


@torch.inference_mode()
def sample(model: DiffusionModel, latents: torch.Tensor) -> torch.Tensor:
    prompts, empty = model.encode(CAPTIONS), model.encode_empty().expand(2)
    for level in model.levels(STEPS):
        outputs = (model.predict(latents, level, text, GUIDANCE) for text in (empty, prompts))
        latents = model.step(model.guide(*outputs, GUIDANCE), level, latents)
    return latents


def test_the_guided_loop_is_diffusers_own(model: DiffusionModel) -> None:
    latents = model.noise_bank(2, NOISE_SEED)
    found, expected = sample(model, latents.clone()), theirs(model, latents, "latent")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_pictures_are_diffusers_own(model: DiffusionModel) -> None:
    latents = model.noise_bank(2, NOISE_SEED)
    sampler = TrajectorySampler(model, num_noises=2, seed=NOISE_SEED, steps=STEPS, guidance_scale=GUIDANCE)
    images = sampler(CAPTIONS, [0, 1]).images
    assert images is not None and images.shape == (2, *model.image_size, 3)
    assert np.abs(images / 255 - theirs(model, latents, "np")).max() < 0.51 / 255 + 1e-3


def test_units_are_exact(model: DiffusionModel) -> None:
    """What two ideal models that believe in different pictures say, subtracted: in every unit what it is defined as."""
    schedule = model.schedule
    for level in (model.levels(50)[0], model.levels(50)[20]):
        a, s = level.signal, level.noise
        shape = (1, *model.latent_shape)
        clean, other, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        x = a * clean + s * noise
        difference = clean - other
        output = schedule.slope(level) * difference  # by the definition of the slope
        if a > 0:
            expected = -(a / s) * difference  # eps = (x - a x_0) / s
            found = output * schedule.factor(level, "epsilon")
            torch.testing.assert_close(found, expected)
        velocity = output * schedule.factor(level, "velocity")
        torch.testing.assert_close(velocity, -difference / s)
        # and the slope itself: outputs turned into clean latents, subtracted
        raw = torch.randn(shape), torch.randn(shape)
        believed = [schedule.predictions(each, x.float(), level)[0].double() for each in raw]
        step = (raw[0] - raw[1]).double() / schedule.slope(level)
        torch.testing.assert_close(believed[0] - believed[1], step, rtol=1e-3, atol=1e-3 * float(step.abs().max()))


def test_unit_is_of_the_first_level(models: dict[str, DiffusionModel]) -> None:
    units = {kind: model.unit(50) for kind, model in models.items()}
    assert {kind for kind, unit in units.items() if unit == "velocity"} == {"sd3", "sd3_clip", "zero_snr", "sana"}
    assert models["zero_snr"].levels(50)[0].signal == 0.0


def test_watching_changes_nothing(model: DiffusionModel) -> None:
    prompts, latents, level = model.encode(CAPTIONS), model.noise_bank(2, 0), model.levels(10)[0]
    layers = tuple(model.layers(model.denoiser))
    with torch.inference_mode():
        plain = model.predict(latents, level, prompts)
        for token in ("eos", "padding", *(["bos"] if model.fixed_tokens else [])):
            with model.capture(layers, prompts, token) as seen:
                assert torch.equal(model.predict(latents, level, prompts), plain)
            assert set(seen.masks) == set(layers)
            if layers:
                mask = seen.mask(model.latent_shape[1:])
                assert mask.shape == (2, *model.latent_shape[1:]) and mask.isfinite().all() and (mask >= 0).all()


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch(model: DiffusionModel) -> None:
    captions = [f"a house with {i} windows" for i in range(5)]
    one, many = (FirstStepScorer(model, batch_size=size, num_noises=2)(captions) for size in (1, 7))
    for name, values in many.scores.items():
        np.testing.assert_allclose(values, one.scores[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many.energy_mask, one.energy_mask, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_loads_are_bit_identical(model: DiffusionModel) -> None:
    again = load(find_model(model.name), "cpu", "float32")
    assert torch.equal(again.encode(CAPTIONS).hidden, model.encode(CAPTIONS).hidden)
    one, two = (FirstStepScorer(each, extra_evaluation=True)(CAPTIONS) for each in (model, again))
    assert one.scores.keys() == two.scores.keys()
    for name in one.scores:
        np.testing.assert_array_equal(one.scores[name], two.scores[name])


@pytest.mark.sampling
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_half_precision_is_the_dtype_asked_for(model: DiffusionModel, dtype: str) -> None:
    """Every weight of what diffusers loads, whatever the file's; scored, sampled, decoded and mitigated in it."""
    half = load(find_model(model.name), "cpu", dtype)
    for part in (half.denoiser, half.vae):
        assert {parameter.dtype for parameter in part.parameters()} <= {half.dtype} if part is not None else True
    exact, rough = (FirstStepScorer(each)(CAPTIONS).scores["ld_energy"] for each in (model, half))
    np.testing.assert_allclose(rough, exact, rtol=0.1)
    images = TrajectorySampler(half, steps=2)(CAPTIONS[:1]).images
    assert images is not None and images.std() > 0
    moved = Mitigator(half, "magnitude", 0.0, iterations=1)(CAPTIONS[:1], half.noise_bank(1, 0))
    assert np.isfinite(moved.last_loss).all()


def ids_seen(model: DiffusionModel, captions: list[str]) -> tuple[Embeddings, dict[str, list[list[int]]]]:
    """Embeddings, and the ids that every text encoder was given for them."""
    seen: dict[str, list[list[int]]] = {}
    handles = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(model.pipeline, name, None)
        if encoder is not None:

            def remember(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                seen[name] = (args[0] if args else kwargs["input_ids"]).tolist()

            handles.append(encoder.register_forward_pre_hook(remember, with_kwargs=True))
    found = model.encode(captions)
    for handle in handles:
        handle.remove()
    return found, seen


def test_what_is_counted_is_what_the_encoder_saw(model: DiffusionModel) -> None:
    """End of text, number of tokens and the cut, against the ids that reached the encoders."""
    found, seen = ids_seen(model, ["a red cat", "", "two dogs on a hill", "word " * 300])
    longest = "text_encoder_3" if "text_encoder_3" in seen else "text_encoder"
    tokenizer = getattr(model.pipeline, longest.replace("text_encoder", "tokenizer"))
    first = model.pipeline.tokenizer
    assert found.truncated.tolist() == [False, False, False, True]
    if isinstance(model, Sana):  # which is given an instruction before, a start token and no end
        counts = [sum(token != tokenizer.pad_token_id for token in row) for row in seen[longest]]
        assert found.num_tokens.tolist()[:3] == [count - counts[1] for count in counts[:3]]
        real = found.conditions["encoder_attention_mask"].sum(1) - 1
        assert found.eos_positions.tolist() == real.tolist()
        return
    ends = [row.index(tokenizer.eos_token_id) for row in seen[longest]]
    started = [row[0] == tokenizer.bos_token_id for row in seen[longest]]
    counts = [end - start for end, start in zip(ends, started, strict=True)]
    assert found.num_tokens.tolist()[:3] == counts[:3]
    assert found.num_tokens[3] > counts[3] == len(seen[longest][3]) - 1 - started[3]
    assert found.eos_positions.tolist() == [row.index(first.eos_token_id) for row in seen["text_encoder"]]


def test_scores_that_are_not_defined_are_not_there(models: dict[str, DiffusionModel]) -> None:
    for kind, model in models.items():
        found = FirstStepScorer(model)(CAPTIONS)
        assert ("ld" in found.scores) == (found.mask is not None) == (model.no_mask == "")
        assert ("webster" in found.scores) == (model.unit(50) == "epsilon")
        assert np.isfinite(found.scores["ld_energy"]).all() and (found.scores["magnitude"] > 0).all(), kind


@pytest.mark.parametrize("kind", ("pixart", "sd3"))
def test_layers_that_are_named_give_a_mask(models: dict[str, DiffusionModel], kind: str) -> None:
    model = models[kind]
    layers = tuple(model.layers(model.denoiser)[:1])
    found = FirstStepScorer(model, MaskSource(layers=layers))(CAPTIONS)
    assert found.mask is not None and np.isfinite(found.scores["ld"]).all()


def test_padding_is_never_looked_at_where_it_is_masked(models: dict[str, DiffusionModel]) -> None:
    model = models["pixart"]
    prompts, latents, level = model.encode(CAPTIONS), model.noise_bank(2, 0), model.levels(10)[0]
    layers = tuple(model.layers(model.denoiser))
    with torch.inference_mode():
        masks = []
        for token in ("eos", "padding"):  # everything after the end is padding, whose attention is masked to nothing
            with model.capture(layers, prompts, token) as seen:  # type: ignore[arg-type]
                model.predict(latents, level, prompts)
            masks.append(seen.mask(model.latent_shape[1:]))
        torch.testing.assert_close(*masks)
    assert prompts.eos_positions.tolist() == prompts.num_tokens.tolist()


@pytest.mark.sampling
def test_mitigation_lowers_the_loss(model: DiffusionModel) -> None:
    prompts, noises = CAPTIONS, model.noise_bank(2, 0)
    mitigator = Mitigator(
        model, "ld", 0.0, mask_source=MaskSource("energy"), iterations=8, learning_rate=0.02, guidance_scale=GUIDANCE
    )
    moved = mitigator(prompts, noises)
    assert (moved.last_loss < moved.first_loss).all()
    kept = model.fixed_tokens
    assert torch.equal(moved.embeddings.hidden[:, :kept], model.encode(prompts).hidden[:, :kept])


def test_pixart_alpha_cuts_captions_sooner(models: dict[str, DiffusionModel]) -> None:
    caption = "word " * 40  # 200 letters and 40 more pieces
    found = {kind: bool(models[kind].encode([caption]).truncated[0]) for kind in ("pixart", "pixart_alpha")}
    assert found == {"pixart": False, "pixart_alpha": True}


@pytest.mark.parametrize("kind", ("sd3", "sana"))
def test_a_lora_of_a_transformer_is_merged(models: dict[str, DiffusionModel], tmp_path: Path, kind: str) -> None:
    name = "transformer_blocks.1.attn2.to_q" if kind == "sana" else "transformer_blocks.1.attn.to_q"
    before = models[kind].denoiser.state_dict()
    weight = before[f"{name}.weight"]
    down, up = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    stem = f"transformer.{name}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "my.safetensors")
    found = load(find_model(models[kind].name, loras=(f"{tmp_path}/my.safetensors:0.5",)), "cpu", "float32")
    for key, value in found.denoiser.state_dict().items():
        expected = weight + 0.5 * up @ down if key == f"{name}.weight" else before[key]
        torch.testing.assert_close(value, expected)


def test_families_that_diffusers_has_no_adapters_for_say_so(models: dict[str, DiffusionModel], tmp_path: Path) -> None:
    file = tmp_path / "my.safetensors"
    save_file({"model.diffusion_model.a": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="diffusers has no LoRA for a PixArtSigmaPipeline"):
        load(find_model(models["pixart"].name, loras=(str(file),)), "cpu")
    with pytest.raises(ModelError, match="diffusers reads no single file as a IFPipeline"):
        find_model(str(file), model_config=models["if"].name)
    with pytest.raises(ModelError, match="IFPipeline cannot be mitigated: it draws its initial noise itself"):
        MitigatedPipeline(models["if"].pipeline, 1.0, 0.5)


def test_families_refuse_other_schedules(models: dict[str, DiffusionModel]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="its scheduler is FlowMatchEulerDiscreteScheduler"):
        type(models["sd1"]).open_schedule(scheduler, models["sd1"].denoiser.config)
