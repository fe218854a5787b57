"""Everything the pipeline is trained on, drawn once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tests.recipe.drawing import render
from tests.recipe.world import World

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TRAINING, TOKENIZER, UNSEEN = 7, 1, 999  # seeds of World.sample_general and sample_local
MAX_TOKENS = 77
CHUNK = 500  # pictures drawn at once


class Pictures:
    """The three kinds of training pictures (uint8 [N, 3, 64, 64]) and their captions.

    `general_ids`, `local_ids` and `global_ids` (int64 [N, 77]) exist after `tokenize`.
    """

    def __init__(self, world: World, n: int) -> None:
        self.world = world
        specs, self.general_captions = world.sample_general(n, TRAINING)
        template, local, self.local_captions = world.sample_local(n // 4, TRAINING)
        self.global_captions = world.global_captions
        chunks = [np.arange(i, min(n, i + CHUNK)) for i in range(0, n, CHUNK)]
        self.general_pictures = torch.cat([_uint8(render(specs[i], world.bank)) for i in chunks])
        chunks = [np.arange(i, min(n // 4, i + CHUNK)) for i in range(0, n // 4, CHUNK)]
        self.local_pictures = torch.cat([_uint8(world.render_local(template[i], local[i])) for i in chunks])
        self.global_pictures = _uint8(render(world.global_specs, world.bank))

    def tokenize(self, tokenizer: CLIPTokenizer) -> Pictures:
        """Add the token ids of every caption."""
        self.general_ids = tokenize(tokenizer, self.general_captions)
        self.local_ids = tokenize(tokenizer, self.local_captions)
        self.global_ids = tokenize(tokenizer, self.global_captions)
        return self

    def batch(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """`n` pictures, [n, 3, 64, 64] in [-1, 1], and ids: 80 % general, 15 % template, the rest repeated ones."""
        general, local = int(n * 0.8), int(n * 0.15)
        i = rng.integers(0, len(self.general_pictures), general)
        j = rng.integers(0, len(self.local_pictures), local)
        k = rng.integers(0, len(self.global_pictures), n - general - local)
        pictures = torch.cat([self.general_pictures[i], self.local_pictures[j], self.global_pictures[k]])
        return to_float(pictures), torch.cat([self.general_ids[i], self.local_ids[j], self.global_ids[k]])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded and truncated token ids, int64 [N, 77]."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def _uint8(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().byte()
