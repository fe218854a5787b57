"""A model that is watched and can be made to fail, and captions for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import load
from pipelines.families import StableDiffusion
from pipelines.model import DiffusionModel, Embeddings
from pipelines.schedules import NoiseLevel


class Watched(StableDiffusion):
    """Counts latents; prompts of `poison` tokens fail, give NaN, or take more memory than there is."""

    latents = 0
    poison: tuple[int, ...] = ()
    kind = "raise"

    def predict(
        self,
        latents: torch.Tensor,
        level: NoiseLevel,
        prompts: Embeddings,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        Watched.latents += len(latents)
        output = super().predict(latents, level, prompts, guidance_scale)
        bad = torch.isin(prompts.num_tokens, torch.tensor(self.poison)) & (prompts.num_tokens > 0)
        if bad.any() and self.kind == "raise":
            raise ValueError("cannot be scored")
        output[bad.nonzero()[:, 0]] = torch.nan
        return output


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """Jobs load this model instead."""

    def load_watched(*arguments: Any) -> DiffusionModel:
        return load(*arguments).again(Watched)

    monkeypatch.setattr("pipelines.loading.load", load_watched)
    monkeypatch.setattr(Watched, "latents", 0)
    return Watched


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Six rows; that of seven tokens is the one to be poisoned, and is repeated."""
    captions = ["one", "one two", "a b c d e f g", "one two three", "a b c d e f g", "one two three four"]
    pq.write_table(pa.table({"TEXT": captions}), tmp_path / "six.parquet")
    return tmp_path / "six.parquet"
