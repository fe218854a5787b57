"""Pictures are finite or they are errors, and decoding costs neither the trajectory nor the denoiser's batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import TrajectorySampler, find_model, load
from pipelines.families import StableDiffusion
from pipelines.model import DECODE_AT_ONCE


class Overflowing(StableDiffusion):
    """A VAE that overflows in float16; with `always` in float32 too."""

    always = False

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        images = super().decode_raw(latents)
        return images * torch.nan if self.always or self.vae.dtype == torch.float16 else images


class Small(StableDiffusion):
    """A device on which the VAE has room for `room` pictures."""

    room, calls, evaluations = 1, 0, 0

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        Small.calls += 1
        if len(latents) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().decode_raw(latents)

    def predict(self, *arguments: Any) -> torch.Tensor:
        Small.evaluations += 1
        return super().predict(*arguments)


def open_sd1(folders: dict[str, Path], kind: type[StableDiffusion], dtype: str = "float32") -> Any:
    return load(find_model(str(folders["sd1"])), "cpu", dtype).again(kind)


def test_what_is_not_finite_in_half_precision_is_decoded_again(model_folders: dict[str, Path]) -> None:
    model = open_sd1(model_folders, Overflowing, "float16")
    latents = model.noise_bank(3, 0)
    images = model.decode(latents.half())
    assert model.vae.dtype == torch.float16 and images.isfinite().all()
    exact = load(find_model(str(model_folders["sd1"])), "cpu", "float32").decode(latents)
    torch.testing.assert_close(images, exact, rtol=0, atol=0.02)


def test_what_is_never_finite_is_an_error(model_folders: dict[str, Path]) -> None:
    model = open_sd1(model_folders, Overflowing)
    model.always = True
    with pytest.raises(ValueError, match="not finite"):
        TrajectorySampler(model, steps=2)(["a house"])


@pytest.mark.slow
def test_decoding_backs_off_by_itself(model_folders: dict[str, Path]) -> None:
    model, captions = open_sd1(model_folders, Small), [f"house {i}" for i in range(5)]
    Small.calls = Small.evaluations = 0
    sampler = TrajectorySampler(model, steps=3, batch_size=8)
    images = sampler(captions).images
    assert Small.evaluations == 3 and sampler.batches.batch_size == 8  # one trajectory, its batch as it was
    assert Small.calls == 2 + 5  # 4 and 2 do not fit, then one by one
    expected = TrajectorySampler(load(find_model(str(model_folders["sd1"])), "cpu"), steps=3)(captions).images
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1  # type: ignore[union-attr]
    model.room = 0
    with pytest.raises(RuntimeError, match="single picture does not fit"):
        sampler(captions)
    assert sampler.batches.batch_size == 8


def test_a_few_are_decoded_at_a_time(model_folders: dict[str, Path]) -> None:
    model = open_sd1(model_folders, Small)
    model.room, Small.calls = 100, 0
    model.decode(model.noise_bank(9, 0))
    assert Small.calls == -(-9 // DECODE_AT_ONCE)
