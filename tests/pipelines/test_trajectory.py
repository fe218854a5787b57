"""One pass against the official two, and against diffusers' own pipelines started from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from pipelines import DiffusionModel, FirstStepScorer, MaskSource, TrajectorySampler, find_model, load
from pipelines.families import StableDiffusion
from tests.reference import Reference

pytestmark = pytest.mark.sampling

KINDS = ("sd1", "sd2", "sdxl", "testbed")
CAPTIONS = ["a red house", "two dogs on a very long green street"]
STEPS = 12  # more than the window of 10


def open_model(folder: Path) -> DiffusionModel:
    return load(find_model(str(folder)), "cpu", "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_two(model_folders: dict[str, Path], kind: str) -> None:
    """LD of every step and window from energy maps, BE masks, the score map and pictures."""
    model, reference = open_model(model_folders[kind]), Reference(model_folders[kind])
    sampler = TrajectorySampler(model, num_noises=2, seed=5, steps=STEPS)
    found, windows = sampler(CAPTIONS, [1, 0]), sampler(CAPTIONS, [1, 0], decode=False).windows()
    for row, caption in enumerate(CAPTIONS):
        expected = reference.trajectory(caption, reference.noises(2, 5)[1 - row], STEPS)
        # float32 drifts apart over the steps; on equal inputs it is 1e-5 (test_attention)
        np.testing.assert_allclose(found.be_mask[row], expected["be_mask"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.first_mask[row], expected["masks_t"][0], atol=1e-5)
        np.testing.assert_allclose(found.magnitude_t[row], expected["magnitude_t"], rtol=2e-4)
        np.testing.assert_allclose(found.ld_t[row], expected["ld_t"], rtol=2e-4)
        np.testing.assert_allclose(found.score_map[row], expected["score_map"], rtol=1e-3, atol=1e-4)
        for name, values in (("ld", expected["ld_t"]), ("magnitude", expected["magnitude_t"])):
            first = windows["ld_first" if name == "ld" else name][row]
            assert first == pytest.approx(values[0], rel=1e-4)
            assert windows[f"{name}_10"][row] == pytest.approx(values[:10].mean(), rel=1e-4)
            assert windows[f"{name}_all"][row] == pytest.approx(values.mean(), rel=1e-4)
        difference = found.images[row] / 255 - expected["image"]  # type: ignore[index]
        assert np.abs(difference).max() < 1 / 255


@pytest.mark.parametrize("kind", ("sd1", "sd2", "sdxl"))
def test_ld_from_energy_maps_is_the_direct_formula(model_folders: dict[str, Path], kind: str) -> None:
    """The identity alone, on the same tensors: ||d m|| / mean(m) = sqrt(sum m^2 E) / mean(m), within 1e-5."""
    model = open_model(model_folders[kind])
    differences: list[torch.Tensor] = []

    class Watched(type(model)):  # type: ignore[misc]
        def difference(self, *arguments: Any) -> Any:
            differences.append(super().difference(*arguments))
            return differences[-1]

    found = TrajectorySampler(model.again(Watched), steps=STEPS)(CAPTIONS, decode=False)
    masks = torch.from_numpy(found.be_mask)
    for step in range(STEPS):
        d = differences[step]
        for row, mask in enumerate(masks):
            direct = float((d[row] * mask).norm() / mask.mean())
            assert found.ld_t[row, step] == pytest.approx(direct, rel=1e-5)
            assert found.magnitude_t[row, step] == pytest.approx(float(d[row].norm()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_diffusers(model_folders: dict[str, Path], kind: str) -> None:
    """The pipeline people use, with DDIM, eta 0 and clip_sample off, started from the same noise."""
    folder, steps = model_folders[kind], 4 if kind == "testbed" else STEPS
    sampler = TrajectorySampler(open_model(folder), num_noises=2, seed=9, steps=steps, guidance_scale=5.0)
    found = sampler(CAPTIONS, [0, 1]).images
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=steps,
        guidance_scale=5.0,
        eta=0.0,
        latents=sampler.noises.clone(),
        output_type="np",
    ).images
    assert np.abs(found / 255 - theirs).max() < 0.51 / 255 + 1e-3


def test_masks_of_every_step(model_folders: dict[str, Path]) -> None:
    model, reference = open_model(model_folders["sd1"]), Reference(model_folders["sd1"])
    sampler = TrajectorySampler(model, steps=5)
    found = sampler.sample(model.encode(CAPTIONS), sampler.noises.expand(2, -1, -1, -1), every_step=True)
    for row, caption in enumerate(CAPTIONS):
        expected = reference.trajectory(caption, reference.noises(1, 0)[0], 5)
        np.testing.assert_allclose(found["masks_t"][row].numpy(), expected["masks_t"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("sd1", "sd2", "sdxl"))
def test_first_step_agrees_with_the_first_step_scorer(model_folders: dict[str, Path], kind: str) -> None:
    model = open_model(model_folders[kind])
    for token in ("eos", "bos"):
        source = MaskSource(token=token)  # type: ignore[arg-type]
        scores = FirstStepScorer(model, source, seed=2)(CAPTIONS)
        found = TrajectorySampler(model, source, seed=2)(CAPTIONS, decode=False)
        for name in ("ld_energy", "webster", "attention_entropy", "cosine"):
            np.testing.assert_allclose(found.first[name], scores.scores[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.magnitude_t[:, 0], scores.scores["magnitude"], rtol=1e-4)
        np.testing.assert_allclose(found.first["ld"], scores.scores["ld"], rtol=1e-4)
        np.testing.assert_allclose(found.first_mask, scores.mask, atol=1e-6)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_batch_size_changes_nothing(model_folders: dict[str, Path], kind: str) -> None:
    model, captions = open_model(model_folders[kind]), [f"a house with {i} windows" for i in range(5)]
    one, many = (TrajectorySampler(model, steps=4, batch_size=size)(captions) for size in (1, 64))
    np.testing.assert_allclose(many.ld_t, one.ld_t, rtol=1e-4)
    np.testing.assert_allclose(many.be_mask, one.be_mask, atol=1e-6)
    assert np.abs(many.images.astype(int) - one.images.astype(int)).max() <= 1  # type: ignore[union-attr]


def test_one_step_is_first_and_last(model_folders: dict[str, Path]) -> None:
    found = TrajectorySampler(open_model(model_folders["sd1"]), steps=1)(CAPTIONS, decode=False)
    np.testing.assert_array_equal(found.be_mask, found.first_mask)
    assert found.ld_t.shape == (2, 1) and np.isfinite(found.windows()["ld_10"]).all()


class SmallMemory(StableDiffusion):
    """A device on which no more than four latents fit at a time: two trajectories with their unconditional halves."""

    def predict(self, latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(latents, *arguments)


def test_out_of_memory_halves_the_batch(model_folders: dict[str, Path]) -> None:
    model = open_model(model_folders["sd1"])
    small = model.again(SmallMemory)
    captions, counted = [f"picture {i}" for i in range(5)], list[int]()
    found = TrajectorySampler(small, steps=3, batch_size=8)(captions, on_batch=counted.append)
    expected = TrajectorySampler(model, steps=3)(captions)
    assert counted == [2, 2, 1]
    np.testing.assert_allclose(found.ld_t, expected.ld_t, rtol=1e-5)
