"""First-step scores against the plain reference, on every shape of model; batches, memory and noises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import DiffusionModel, FirstStepScorer, FirstStepScores, MaskSource, find_model, load
from pipelines.attention import cross_attention_layers
from pipelines.families import StableDiffusion
from pipelines.model import Embeddings
from tests.reference import Reference

KINDS = ("sd1", "sd2", "sdxl", "testbed")
CAPTIONS = ["a red house", "two dogs on a very long green street", "a much too long text " * 30, "cat"]
COLUMNS = (
    "magnitude",
    "ld",
    "ld_energy",
    "webster",
    "attention_entropy",
    "cosine",
    "cosine_low",
    "anisotropy",
    "mask",
    "num_tokens",
    "truncated",
)


@pytest.fixture(scope="module")
def open_model(model_folders: dict[str, Path]) -> Callable[[str], DiffusionModel]:
    return lambda kind: load(find_model(str(model_folders[kind])), "cpu", "float32")


def values(found: FirstStepScores, name: str) -> Any:
    """A score, or what else there is of that name, a row a prompt."""
    return found.scores[name] if name in found.scores else getattr(found, name)


def assert_equal(found: FirstStepScores, expected: list[dict[str, Any]]) -> None:
    for name in COLUMNS:
        wanted = np.stack([row[name] for row in expected])
        # a cosine or a cell of a map may be as good as zero: those are held to the size of their column
        near_zero = 1e-5 * np.abs(wanted).max() if name in ("cosine", "cosine_low", "mask") else 0
        np.testing.assert_allclose(values(found, name), wanted, rtol=1e-4, atol=near_zero, err_msg=name)
    ld_std = [row["ld_std"] for row in expected]
    np.testing.assert_allclose(found.ld_std, ld_std, rtol=1e-3, atol=1e-4 * float(found.scores["ld"].max()))


@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "sd1")]
)
def test_scores_are_the_plain_formulas(
    model_folders: dict[str, Path], open_model: Callable[[str], DiffusionModel], kind: str
) -> None:
    scorer = FirstStepScorer(open_model(kind), num_noises=2, seed=3, extra_evaluation=True, batch_size=5)
    reference = Reference(model_folders[kind])
    assert_equal(scorer(CAPTIONS), [reference.score(caption, num_noises=2, seed=3) for caption in CAPTIONS])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sd1", "sd2"))  # padded with end-of-text and with another token
@pytest.mark.parametrize("token", ("bos", "padding"))
def test_masks_of_other_tokens(
    model_folders: dict[str, Path], open_model: Callable[[str], DiffusionModel], kind: str, token: Any
) -> None:
    scorer = FirstStepScorer(open_model(kind), MaskSource(token=token), extra_evaluation=True)
    reference = Reference(model_folders[kind])
    assert_equal(scorer(CAPTIONS), [reference.score(caption, token=token) for caption in CAPTIONS])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_masks_of_other_layers(
    model_folders: dict[str, Path], open_model: Callable[[str], DiffusionModel], kind: str
) -> None:
    model = open_model(kind)
    layers = (cross_attention_layers(model.denoiser)[-1], cross_attention_layers(model.denoiser)[2])
    found = FirstStepScorer(model, MaskSource(layers=layers), extra_evaluation=True)(CAPTIONS)
    reference = Reference(model_folders[kind])
    assert_equal(found, [reference.score(caption, layers=list(layers)) for caption in CAPTIONS])


@pytest.mark.slow
def test_energy_as_the_mask(model_folders: dict[str, Path], open_model: Callable[[str], DiffusionModel]) -> None:
    """`ld` stays under attention; `ld_energy` and its mask are what the reference gives with that mask."""
    found = FirstStepScorer(open_model("sd1"))(CAPTIONS)
    reference = Reference(model_folders["sd1"])
    for row, caption in enumerate(CAPTIONS):
        expected = reference.score(caption, mask="energy")
        assert found.scores["ld_energy"][row] == pytest.approx(expected["ld"], rel=1e-4)
        np.testing.assert_allclose(found.energy_mask[row], expected["mask"], rtol=1e-4)


@pytest.mark.slow
def test_other_guidance_and_steps(model_folders: dict[str, Path], open_model: Callable[[str], DiffusionModel]) -> None:
    scorer = FirstStepScorer(open_model("sd2"), steps=7, guidance_scale=3.0, extra_evaluation=True)
    reference = Reference(model_folders["sd2"], guidance_scale=3.0)
    assert_equal(scorer(CAPTIONS), [reference.score(caption, steps=7) for caption in CAPTIONS])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_changes_nothing(open_model: Callable[[str], DiffusionModel], kind: str) -> None:
    model, captions = open_model(kind), [f"a house with {i} windows" for i in range(9)] + CAPTIONS
    one, seven, all_at_once = (FirstStepScorer(model, num_noises=2, batch_size=size)(captions) for size in (1, 7, 64))
    for other in (seven, all_at_once):
        for name in ("magnitude", "ld", "ld_energy", "webster", "mask"):
            np.testing.assert_allclose(values(other, name), values(one, name), rtol=1e-4, atol=1e-7)


def test_encoding_ahead_changes_nothing(open_model: Callable[[str], DiffusionModel]) -> None:
    """In a thread, as beside a GPU, before the call or in it; one that has no memory is asked again while it waits."""
    model, captions = open_model("sd1"), [f"a house with {i} windows" for i in range(23)] + CAPTIONS
    threads: list[bool] = []

    class Tight(StableDiffusion):
        def encode(self, captions: list[str]) -> Embeddings:
            threads.append(threading.current_thread() is threading.main_thread())
            if captions[0].endswith("8 windows") and threads.count(False) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().encode(captions)

    scorer = FirstStepScorer(model.again(Tight), num_noises=2, batch_size=4)
    plain, differences = scorer(captions), scorer.differences(captions)
    assert all(threads)
    threads.clear()
    scorer.ahead = 2
    for times in range(2):
        threads.clear()
        if times:
            for expected in (captions[:3], [*captions], captions[3:]):
                scorer.expect(expected)
        found = scorer(captions)
        assert threads.count(True) == 0 and threads.count(False) >= 7
        for name in ("magnitude", "ld", "ld_energy", "mask", "energy_mask", "num_tokens"):
            np.testing.assert_array_equal(values(found, name), values(plain, name))
    np.testing.assert_array_equal(scorer.differences(captions), differences)
    threads.clear()
    assert len(scorer(captions[3:]).scores["magnitude"]) == len(captions) - 3
    assert threads.count(False) <= 6, "what was encoded before was encoded again"


@pytest.mark.parametrize("extra", (False, True))
def test_evaluations_are_one_a_caption_and_noise(open_model: Callable[[str], DiffusionModel], extra: bool) -> None:
    model = open_model("sd1")
    latents = 0

    def count(_module: Any, args: tuple[Any, ...]) -> None:
        nonlocal latents
        latents += len(args[0])

    handle = model.denoiser.register_forward_pre_hook(count)
    scorer = FirstStepScorer(model, num_noises=3, extra_evaluation=extra, batch_size=4)
    assert latents == scorer.evaluations == 3 * (1 + extra)  # the empty prompt, once a noise
    scorer(CAPTIONS)
    scorer(CAPTIONS[:1])
    handle.remove()
    assert latents == scorer.evaluations == 3 * (1 + extra) * (1 + 5)


class SmallMemory(StableDiffusion):
    """A device on which no more than `limit` latents fit at a time."""

    limit = 3

    def predict(self, latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(latents) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(latents, *arguments)


def test_out_of_memory_halves_the_batch_for_good(open_model: Callable[[str], DiffusionModel]) -> None:
    model = open_model("sd1")
    small = model.again(SmallMemory)
    scorer, batches = FirstStepScorer(small, batch_size=16), []
    captions = [f"picture {i}" for i in range(10)]
    found = scorer(captions, batches.append)
    assert scorer.batches.batch_size == 2 and batches == [2] * 5
    np.testing.assert_allclose(found.scores["ld"], FirstStepScorer(model)(captions).scores["ld"], rtol=1e-5)
    small.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        scorer(captions)


def test_finished_captions_are_counted_whole(open_model: Callable[[str], DiffusionModel]) -> None:
    counted: list[int] = []
    FirstStepScorer(open_model("sd1"), num_noises=2, batch_size=3)(CAPTIONS, counted.append)
    assert sum(counted) == len(CAPTIONS) and counted == [1, 2, 1]  # 3, 6 and 8 of 8 pairs
