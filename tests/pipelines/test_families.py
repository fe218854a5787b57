"""The contract of a family: every one samples, measures, decodes and is watched as diffusers' own pipeline of it."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from pipelines import DiffusionModel, FirstStepScorer, MaskSource, Mitigator, TrajectorySampler, find_model, load
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
        for token in ("eos", "bos", "padding"):
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


def test_families_refuse_other_schedules(models: dict[str, DiffusionModel]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="its scheduler is FlowMatchEulerDiscreteScheduler"):
        type(models["sd1"]).open_schedule(scheduler, models["sd1"].denoiser.config)
