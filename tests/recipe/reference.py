"""Sampling and scores as the formulas read, with no shortcut: what evaluate.py measures the testbed with.

It shares nothing with the packages it may be used to check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel


class EosAttention:
    """Attention to the first end-of-text token in the first two cross-attentions of the down path, mean over heads."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.maps: list[Tensor] | None = None  # [B, tokens of the picture, 77] a layer, while recording
        for attention in unet.down_blocks[0].attentions:
            layer = attention.transformer_blocks[0].attn2
            layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def start(self) -> None:
        """Record the next forward pass."""
        self.maps = []

    def take(self, eos: Tensor) -> Tensor:
        """The maps of the pass since `start`, [B, layers, H, W]; `eos` is [B], the token's position."""
        assert self.maps is not None
        probabilities, self.maps = torch.stack(self.maps, 1), None
        side = int(probabilities.shape[2] ** 0.5)
        return probabilities[torch.arange(len(eos)), :, :, eos].unflatten(-1, (side, side))

    def _record(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.maps is None:
            return

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()

        q, k = split(layer.to_q(args[0])), split(layer.to_k(kwargs["encoder_hidden_states"]))
        self.maps.append((q @ k.transpose(-1, -2) * layer.scale).softmax(-1).mean(1))


@dataclass
class Trajectory:
    """One batch of sampled latents with what was seen on the way."""

    latents: Tensor  # [B, 4, H, W]
    energy: Tensor  # [B, steps, H, W]: squared noise difference, summed over channels
    first: Tensor  # [B, layers, H, W]: attention to EOS at the first step
    final: Tensor  # the same at the last step


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    attention: EosAttention,
    noise: Tensor,
    condition: Tensor,
    empty: Tensor,
    eos: Tensor,
    guidance: float,
) -> Trajectory:
    """Classifier-free guidance with two separate U-Net calls a step; `scheduler.set_timesteps` was called.

    Args:
        noise: [B, 4, H, W]; condition, empty: text embeddings [B, 77, D]; eos: [B], the first end-of-text position.
    """
    x, energy, seen = noise, [], []
    for t in scheduler.timesteps:
        attention.start()
        with_text = unet(x, t, encoder_hidden_states=condition).sample
        seen.append(attention.take(eos))
        without = unet(x, t, encoder_hidden_states=empty).sample
        energy.append(((with_text - without) ** 2).sum(1))
        x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
    return Trajectory(x, torch.stack(energy, 1), seen[0], seen[-1])


def localised(mask: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """||d * m||_2 / mean(m) from an energy map; mask and energy are [..., H, W]."""
    return np.sqrt((mask**2 * energy).sum((-2, -1))) / mask.mean((-2, -1))


def smooth(energy: np.ndarray) -> np.ndarray:
    """3 x 3 mean of [N, H, W], edges counted by what they cover."""
    x = torch.from_numpy(energy)[:, None]
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)[:, 0].numpy()


def tpr_at(positive: np.ndarray, negative: np.ndarray, fpr: float = 0.01) -> float:
    """Share of positives above the negatives' 1 - fpr quantile."""
    return float((positive > np.quantile(negative, 1 - fpr)).mean())
