"""Mitigations of others, to compare with: random tokens or numbers in the caption, and rescaled cross-attention.

Somepalli et al. 2023, "Understanding and Mitigating Copying in Diffusion Models" (DCR, sd_mitigation.py) and Ren et
al. 2024, "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention" (MemAttn,
refactored_attention_processor.py). All act at inference and need no gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.attention import cross_attention_layers


def insert_random_tokens(captions: list[str], tokenizer: Any, count: int = 4, seed: int = 0) -> list[str]:
    """Random token addition (RT): `count` random tokens of the vocabulary, decoded, each between two words at random.

    DCR draws ids under 49,400 of CLIP's vocabulary; here all but the special ones. What is inserted depends on the
    caption and the seed alone.

    Args:
        captions: N captions. tokenizer: of the model. count: insertions a caption (DCR's command has 4, its function
            2). seed: of the draw.
    Returns:
        N captions.
    """
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    return [_insert(caption, count, seed, lambda draw: tokenizer.decode([draw.choice(ids)])) for caption in captions]


def insert_random_numbers(captions: list[str], count: int = 4, seed: int = 0) -> list[str]:
    """Random number addition (RNA): `count` numbers in [0, 99999], each between two words at random.

    Args and returns as `insert_random_tokens`.
    """
    return [_insert(caption, count, seed, lambda draw: str(draw.randrange(100_000))) for caption in captions]


def _insert(caption: str, count: int, seed: int, word: Callable[[random.Random], str]) -> str:
    draw = random.Random(f"{seed} {caption}")  # seeded by text: the same on every platform and in every batch
    words = caption.split(" ")
    for _ in range(count):
        words.insert(draw.randint(0, len(words)), word(draw))
    return " ".join(words)


@contextmanager
def rescaled_attention(
    unet: nn.Module, eos_positions: Tensor, bos_factor: float = 1.25, keep_eos: bool = True
) -> Iterator[None]:
    """Cross-attention of Ren et al. for the U-Net calls inside the block, in every layer and step.

    Keys after the prompt are masked out, and the logit of the start-of-text key is multiplied by `bos_factor`: for
    the conditional rows alone, as in the authors' code, while its mask covers the unconditional rows too. (The logit
    is linear in the key, so the key is scaled.) Hooks do both; they are removed on the way out, errors included.

    A U-Net call inside sees the prompts' B rows, or 2 B with the unconditional ones first. A mask that is captured
    inside sees the scaled key but all keys.

    Args:
        unet: the denoising network.
        eos_positions: index of the first end-of-text token of each prompt, [B], int64.
        bos_factor: c1; 1.25 is the authors'.
        keep_eos: the first end-of-text key stays, as in the authors' command; False masks it as well (their option
            `mask_length_minis1`).

    Raises:
        ValueError: a U-Net call inside with another number of rows.
    """
    batch = len(eos_positions)
    kept = eos_positions.cpu() + int(keep_eos)

    def mask_keys(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        encoded: Tensor = args[1] if len(args) > 1 else options["encoder_hidden_states"]
        if len(encoded) not in (batch, 2 * batch):
            raise ValueError(f"a U-Net call of {len(encoded)} rows in rescaled_attention of {batch} prompts")
        after = torch.arange(encoded.shape[1])[None] >= kept.repeat(len(encoded) // batch)[:, None]
        bias = torch.zeros(after.shape).masked_fill(after, float("-inf"))[:, None]  # [rows, 1, L]
        return args, {**options, "attention_mask": bias.to(encoded.device, encoded.dtype)}

    def scale_bos(_: nn.Module, __: tuple[Any, ...], keys: Tensor) -> Tensor:
        scaled = keys.clone()
        scaled[-batch:, 0] *= bos_factor
        return scaled

    modules: dict[str, Any] = dict(unet.named_modules())
    handles = []
    for name in cross_attention_layers(unet):
        handles.append(modules[name].register_forward_pre_hook(mask_keys, with_kwargs=True))
        handles.append(modules[name].to_k.register_forward_hook(scale_bos))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
