"""Mitigation: gradients against finite differences, updates against AdamW by hand, and rows that leave others alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from pipelines import DiffusionModel, TrajectorySampler, find_model, load
from pipelines.attention import MaskSource, capture_attention, paper_layers
from pipelines.first_step import FirstStepScorer
from pipelines.loading import ModelError
from pipelines.mitigated_pipeline import MitigatedPipeline
from pipelines.mitigation import Mitigator
from tests.tiny import save_model

pytestmark = pytest.mark.sampling

CAPTIONS = ["a red house", "two dogs on a very long green street", "", "cat"]
STEPS = 4
STRIDE = 3e-3  # of the finite differences: longer ones see the curvature of SD2's attention, shorter ones rounding


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on nets this small cost several times what they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in ("sd1", "sd2", "sdxl")}


def tiny(folders: dict[str, Path], kind: str, dtype: str = "float32") -> DiffusionModel:
    return load(find_model(str(folders[kind])), "cpu", dtype)


@pytest.fixture(scope="module")
def sd1(folders: dict[str, Path]) -> DiffusionModel:
    return tiny(folders, "sd1")


def some_masks(model: DiffusionModel, count: int, seed: int = 5) -> torch.Tensor:
    return torch.rand((count, *model.latent_shape[1:]), generator=torch.Generator().manual_seed(seed)) + 0.1


def difference(model: DiffusionModel, captions: list[str], noises: torch.Tensor) -> np.ndarray:
    """d at the first step, from two plain evaluations."""
    level = model.levels(STEPS)[0]
    with torch.inference_mode():
        outputs = [
            model.predict(noises, level, embeddings)
            for embeddings in (model.encode(captions), model.encode_empty().expand(len(captions)))
        ]
    return (outputs[0] - outputs[1]).numpy().astype(np.float64)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("loss", ["ld", "magnitude"])
def test_gradient_equals_finite_differences(folders: dict[str, Path], kind: str, loss: Any) -> None:
    model = tiny(folders, kind)
    model.denoiser.double()
    mitigator = Mitigator(model, loss, steps=STEPS)
    noises, masks = model.noise_bank(2, 0).double(), some_masks(model, 2)
    prompts = model.encode(CAPTIONS[:2])
    conditions = {name: value.clone().double() for name, value in prompts.conditions.items()}
    prompts = replace(prompts, hidden=prompts.hidden.clone().double(), conditions=conditions)
    # a constant near the predictions, so that the loss is small and its float32 rounding with it
    with torch.no_grad():
        middle = prompts.hidden.mean(1, keepdim=True).expand_as(prompts.hidden)
        uncond = model.predict(noises, mitigator.level, replace(prompts, hidden=middle))

    def value(hidden: torch.Tensor) -> torch.Tensor:
        return mitigator.loss(replace(prompts, hidden=hidden), noises, uncond, masks)

    hidden = prompts.hidden.requires_grad_()
    gradient = torch.autograd.grad(value(hidden).sum(), hidden)[0]
    generator = torch.Generator().manual_seed(1)
    for row in range(2):
        # along the gradient and along one random direction; the network is float64 but the loss is reduced in
        # float32 (relative 6e-8 and a little more by summing), so a difference over 6e-3 is good to 1e-4 * loss
        for direction in (gradient[row], torch.randn(hidden.shape[1:], generator=generator, dtype=torch.float64)):
            unit = direction / direction.norm()
            step = torch.zeros_like(hidden.detach())
            step[row] = STRIDE * unit
            with torch.no_grad():
                plus, minus = value(hidden + step)[row].item(), value(hidden - step)[row].item()
            tolerance = 1e-4 * plus + 1e-3 * gradient[row].norm().item()
            assert (plus - minus) / (2 * STRIDE) == pytest.approx((gradient[row] * unit).sum().item(), abs=tolerance)
        assert gradient[row].norm() * 0.05 > tolerance  # which is far below what is measured


def test_loss_before_mitigation_is_the_formula_of_the_noise_difference(sd1: DiffusionModel) -> None:
    noises, masks = sd1.noise_bank(2, 0), some_masks(sd1, 2)
    d, m = difference(sd1, CAPTIONS[:2], noises), masks.numpy().astype(np.float64)
    expected = np.sqrt(((d * m[:, None]) ** 2).sum((1, 2, 3))) / m.mean((1, 2))
    found = Mitigator(sd1, "ld", 0.0, steps=STEPS, iterations=0)(CAPTIONS[:2], noises, masks)
    np.testing.assert_allclose(found.first_loss, expected, rtol=1e-4)
    found = Mitigator(sd1, "magnitude", 0.0, steps=STEPS, iterations=0)(CAPTIONS[:2], noises)
    np.testing.assert_allclose(found.first_loss, np.sqrt((d**2).sum((1, 2, 3))), rtol=1e-4)


@pytest.mark.parametrize("step", ["first", "energy"])
def test_trigger_scores_are_the_scan_scores(sd1: DiffusionModel, step: Any) -> None:
    scorer = FirstStepScorer(sd1, steps=STEPS)
    scores = scorer(CAPTIONS[:2]).scores["ld_energy" if step == "energy" else "ld"]
    noises = scorer.noises[[0, 0]]
    found = Mitigator(sd1, "ld", 0.0, mask_source=MaskSource(step), steps=STEPS, iterations=0)(CAPTIONS[:2], noises)
    np.testing.assert_allclose(found.score, scores, rtol=1e-5)


def test_final_masks_are_those_of_the_unmitigated_trajectory(sd1: DiffusionModel) -> None:
    sampler = TrajectorySampler(sd1, num_noises=2, steps=STEPS, guidance_scale=3.0)
    masks = torch.from_numpy(sampler(CAPTIONS[:2], [0, 1], decode=False).be_mask)
    options: dict[str, Any] = {"target": 0.0, "steps": STEPS, "iterations": 1, "guidance_scale": 3.0}
    own = Mitigator(sd1, mask_source=MaskSource("final"), **options)(CAPTIONS[:2], sampler.noises)
    given = Mitigator(sd1, **options)(CAPTIONS[:2], sampler.noises, masks)
    np.testing.assert_allclose(own.first_loss, given.first_loss, rtol=1e-5)
    assert not np.allclose(own.first_loss, own.score, rtol=1e-2)  # the trigger is under the first step's mask


def test_an_update_is_adamw_by_hand_and_spares_the_start_token(sd1: DiffusionModel) -> None:
    noises, masks = sd1.noise_bank(1, 0), some_masks(sd1, 1)
    rate, decay = 0.05, 0.4
    mitigator = Mitigator(sd1, "ld", 0.0, steps=STEPS, learning_rate=rate, weight_decay=decay, iterations=2)
    prompts = sd1.encode(CAPTIONS[:1])
    hidden = prompts.hidden.clone()
    level = sd1.levels(STEPS)[0]
    with torch.no_grad():
        uncond = sd1.predict(noises, level, sd1.encode_empty())
    first = second = torch.zeros_like(hidden[:, 1:])
    for t in (1, 2):  # Loshchilov & Hutter 2019, algorithm 2, with the decay times the rate as PyTorch has it
        leaf = hidden.clone().requires_grad_()
        d = sd1.predict(noises, level, replace(prompts, hidden=leaf)) - uncond
        (d * masks[:, None]).norm().div(masks.mean()).backward()
        g = leaf.grad[:, 1:]
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        hidden[:, 1:] = hidden[:, 1:] * (1 - rate * decay) - rate * step
    found = mitigator(CAPTIONS[:1], noises, masks)
    assert found.iterations_used.tolist() == [2]
    assert torch.equal(found.embeddings.hidden[:, 0], prompts.hidden[:, 0])
    # Adam divides by |g|: entries with a gradient near rounding noise may differ by up to a step
    wrong = (found.embeddings.hidden - hidden).abs() > 1e-3
    assert wrong.float().mean() < 0.005


def test_loss_falls_to_the_target_and_rows_stop_alone(sd1: DiffusionModel) -> None:
    captions, noises = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[3]], sd1.noise_bank(3, 0)
    before = Mitigator(sd1, "magnitude", 0.0, steps=STEPS, iterations=0)(captions, noises).first_loss
    target = float(np.sort(before)[1]) * 0.8
    found = Mitigator(sd1, "magnitude", target, steps=STEPS, learning_rate=0.02, iterations=40)(captions, noises)
    assert (found.last_loss <= target).all()
    assert len(set(found.iterations_used.tolist())) > 1
    for row, used in enumerate(found.iterations_used):
        assert np.isfinite(found.loss_history[row, : used + 1]).all()
        assert np.isnan(found.loss_history[row, used + 1 :]).all()
        assert (found.loss_history[row, :used] > target).all()
    # the loss it reports is the loss of what it returns
    again = Mitigator(sd1, "magnitude", 0.0, steps=STEPS, iterations=0)(found.embeddings, noises)
    np.testing.assert_allclose(again.first_loss, found.last_loss, rtol=1e-5)


def test_untriggered_rows_are_bit_identical_and_the_rest_does_not_notice_them(sd1: DiffusionModel) -> None:
    noises, masks = sd1.noise_bank(4, 0), some_masks(sd1, 4)
    scores = Mitigator(sd1, "ld", 0.0, steps=STEPS, iterations=0)(CAPTIONS, noises, masks).score
    threshold = float(np.sort(scores)[1:3].mean())  # at a score itself, rounding would decide
    options: dict[str, Any] = {"target": 0.0, "steps": STEPS, "iterations": 3}
    found = Mitigator(sd1, "ld", threshold=threshold, **options)(CAPTIONS, noises, masks)
    assert found.triggered.tolist() == (scores > threshold).tolist() and found.triggered.sum() == 2
    hidden = sd1.encode(CAPTIONS).hidden
    for row in np.flatnonzero(~found.triggered):
        assert torch.equal(found.embeddings.hidden[row], hidden[row])
        assert np.isnan(found.loss_history[row]).all() and found.iterations_used[row] == 0
    for row in np.flatnonzero(found.triggered):
        assert not torch.equal(found.embeddings.hidden[row], hidden[row])
        alone = Mitigator(sd1, "ld", **options)([CAPTIONS[row]], noises[[row]], masks[[row]])
        np.testing.assert_allclose(alone.loss_history[0], found.loss_history[row], rtol=1e-3)
    # batch size
    small = Mitigator(sd1, "ld", threshold=threshold, batch_size=1, **options)(CAPTIONS, noises, masks)
    np.testing.assert_allclose(small.loss_history, found.loss_history, rtol=1e-3)


def test_it_is_deterministic(sd1: DiffusionModel) -> None:
    noises = sd1.noise_bank(2, 3)
    runs = [Mitigator(sd1, "ld", 0.0, steps=STEPS, iterations=3)(CAPTIONS[:2], noises) for _ in range(2)]
    assert torch.equal(runs[0].embeddings.hidden, runs[1].embeddings.hidden)
    assert np.array_equal(runs[0].loss_history, runs[1].loss_history)


def test_gradient_checkpointing_changes_memory_alone_and_the_unet_is_left_as_it_was(folders: dict[str, Path]) -> None:
    model = tiny(folders, "sd1")
    model.denoiser.requires_grad_(True)  # as from_pretrained leaves it
    noises = model.noise_bank(1, 0)
    calls, results = [], []
    layer = model.denoiser.get_submodule(paper_layers(model.denoiser)[0])
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(len(results)))
    for on in (False, True):
        mitigator = Mitigator(model, "ld", 0.0, steps=STEPS, iterations=2, gradient_checkpointing=on)
        results.append(mitigator(CAPTIONS[:1], noises))
    handle.remove()
    plain, saving = results
    assert calls.count(1) == calls.count(0) + 2  # computed again in both backward passes
    np.testing.assert_allclose(saving.loss_history, plain.loss_history, rtol=1e-4)
    assert all(p.requires_grad and p.grad is None for p in model.denoiser.parameters())
    assert not model.denoiser.is_gradient_checkpointing


def test_sdxl_moves_the_text_embedding_alone(folders: dict[str, Path]) -> None:
    model = tiny(folders, "sdxl")
    prompts, noises = model.encode(CAPTIONS[:1]), model.noise_bank(1, 0)
    found = Mitigator(model, "ld", 0.0, steps=STEPS, iterations=5, learning_rate=0.02)(prompts, noises)
    assert found.last_loss < found.first_loss
    assert torch.equal(found.embeddings.conditions["text_embeds"], prompts.conditions["text_embeds"])


def test_half_precision_gets_as_far_as_single_precision(folders: dict[str, Path]) -> None:
    losses = []
    for dtype in ("float32", "float16"):
        model = tiny(folders, "sd1", dtype)
        mitigator = Mitigator(model, "ld", 0.0, steps=STEPS, iterations=4, learning_rate=0.02)
        found = mitigator(CAPTIONS[:1], model.noise_bank(1, 0), some_masks(model, 1))
        assert found.embeddings.hidden.dtype == model.dtype
        losses.append(found.loss_history[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_a_loss_scale_that_overflows_backs_off(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(folders, "sd1", "float16")
    given = CAPTIONS[:2], model.noise_bank(2, 0), some_masks(model, 2)
    options: dict[str, Any] = {"target": 0.0, "steps": STEPS, "iterations": 3, "learning_rate": 0.02}
    expected = Mitigator(model, "ld", **options)(*given)
    monkeypatch.setattr("pipelines.mitigation.HALF_SCALE", 2.0**30)  # every first gradient is infinite
    found = Mitigator(model, "ld", **options)(*given)
    assert found.iterations_used.tolist() == [3, 3]
    np.testing.assert_allclose(found.loss_history, expected.loss_history, rtol=0.05)


def test_a_mask_of_zeros_and_the_empty_prompt_are_left_alone(sd1: DiffusionModel) -> None:
    masks = some_masks(sd1, 2)
    masks[0] = 0
    captions = [CAPTIONS[0], ""]  # d of the empty prompt is zero: no gradient leads anywhere
    found = Mitigator(sd1, "ld", 1e-3, steps=STEPS, iterations=2)(captions, sd1.noise_bank(2, 0), masks)
    assert torch.equal(found.embeddings.hidden, sd1.encode(captions).hidden)
    assert found.iterations_used.tolist() == [0, 0]


def test_mistakes_are_named(sd1: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="'lpips' is none of ld, magnitude"):
        Mitigator(sd1, "lpips")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        Mitigator(sd1, target=-1)
    with pytest.raises(ValueError, match="2 prompts but 1 noises"):
        Mitigator(sd1)(CAPTIONS[:2], sd1.noise_bank(1, 0))
    with pytest.raises(ModelError, match="DDPMPipeline cannot be mitigated"):
        MitigatedPipeline(diffusers.DDPMPipeline(sd1.denoiser, sd1.schedule.scheduler), 1.0, 1.0)


def pipeline(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("sampler", ["own", "EulerDiscreteScheduler"])
def test_pipeline_gives_the_same_images_where_nothing_triggers(
    folders: dict[str, Path], kind: str, sampler: str
) -> None:
    pipe = pipeline(folders[kind])
    if sampler != "own":  # its initial noise is scaled, and that must not happen twice
        pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
    options |= {"guidance_scale": 4.0, "negative_prompt": ["blue", "green"]}
    plain = pipe(CAPTIONS[:2], generator=torch.Generator().manual_seed(1), **options)
    wrapped = MitigatedPipeline(pipe, threshold=1e9, target=1.0)
    found = wrapped(CAPTIONS[:2], generator=torch.Generator().manual_seed(1), **options)
    assert type(found) is type(plain)
    assert np.array_equal(found.images, plain.images)
    assert not found.mitigation.triggered.any() and len(found.mitigation.score) == 4


def test_pipeline_mitigates_the_rows_that_trigger(folders: dict[str, Path]) -> None:
    pipe = pipeline(folders["sd1"])
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (7, 8)]  # noqa: E731
    plain = pipe(CAPTIONS[:2], generator=generators(), **options)
    scores = MitigatedPipeline(pipe, 1e9, 0.0)(CAPTIONS[:2], generator=generators(), **options).mitigation.score
    wrapped = MitigatedPipeline(pipe, threshold=float(scores.min()), target=0.0, iterations=3)
    found = wrapped(CAPTIONS[:2], generator=generators(), **options)
    hit = int(scores.argmax())
    assert found.mitigation.triggered.tolist() == [row == hit for row in range(2)]
    assert found.mitigation.last_loss[hit] < found.mitigation.first_loss[hit]
    assert np.array_equal(found.images[1 - hit], plain.images[1 - hit])
    assert not np.array_equal(found.images[hit], plain.images[hit])
    with torch.inference_mode():  # as callers who never want gradients have it
        again = wrapped(CAPTIONS[:2], generator=generators(), **options)
    assert np.array_equal(again.images, found.images)
    assert isinstance(wrapped(CAPTIONS[0], return_dict=False, **options), tuple)
    with pytest.raises(ValueError, match="prompt_embeds"):
        wrapped(CAPTIONS[0], prompt_embeds=torch.zeros(1))


def test_pipeline_with_its_own_latents_a_size_and_no_guidance(folders: dict[str, Path]) -> None:
    pipe = pipeline(folders["sd1"])
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    wrapped = MitigatedPipeline(pipe, threshold=1e9, target=1.0)
    sized = options | {"height": 16, "width": 32, "generator": torch.Generator().manual_seed(0)}
    plain = pipe(CAPTIONS[0], **sized)
    sized["generator"] = torch.Generator().manual_seed(0)
    assert np.array_equal(wrapped(CAPTIONS[0], **sized).images, plain.images)
    latents = torch.randn(1, 4, 16, 16)
    given = wrapped(CAPTIONS[0], latents=latents, **options)
    assert np.array_equal(given.images, pipe(CAPTIONS[0], latents=latents, **options).images)


def test_capture_layers_stay_the_papers(sd1: DiffusionModel) -> None:
    """The mask `first` of mitigation is the paper's two layers at the first step, by the capture itself."""
    noises, level = sd1.noise_bank(1, 0), sd1.levels(STEPS)[0]
    prompts = sd1.encode(CAPTIONS[:1])
    size = sd1.latent_shape[1:]
    with (
        torch.no_grad(),
        capture_attention(sd1.denoiser, paper_layers(sd1.denoiser), prompts.eos_positions, size) as seen,
    ):
        sd1.predict(noises, level, prompts)
    given = Mitigator(sd1, steps=STEPS, target=0.0, iterations=1)(CAPTIONS[:1], noises, seen.mask(size))
    own = Mitigator(sd1, steps=STEPS, target=0.0, iterations=1)(CAPTIONS[:1], noises)
    np.testing.assert_allclose(own.loss_history, given.loss_history, rtol=1e-5)
