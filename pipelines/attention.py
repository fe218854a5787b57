"""Cross-attention of the end-of-text token (the BE mask), captured by hooks that leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.formulas import attention_probabilities, resize_mask

Token = Literal["eos", "bos", "padding"]
Step = Literal["first", "final", "energy"]
TOKENS: tuple[str, ...] = ("eos", "bos", "padding")
STEPS: tuple[str, ...] = ("first", "final", "energy")


@dataclass(frozen=True)
class MaskSource:
    """Where a mask is read from.

    Attributes:
        step: `first` (attention of the first step), `final` (of the last one, the paper's), `energy` (the smoothed
            energy map of the first step; layers and token play no part).
        token: `eos` (the paper's), `bos` (one minus its attention) or `padding` (everything from EOS on, summed).
        layers: names of cross-attention modules, averaged; empty for the paper's two (`paper_layers`).
    """

    step: Step = "first"
    token: Token = "eos"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"mask step {self.step!r} is none of {', '.join(STEPS)}")
        if self.token not in TOKENS:
            raise ValueError(f"mask token {self.token!r} is none of {', '.join(TOKENS)}")

    def describe(self) -> str:
        """One word for a table's `mask_source` column: `first:eos`, `final:eos`, `energy`, ..."""
        if self.step == "energy":
            return "energy"
        layers = f":{'+'.join(self.layers)}" if self.layers else ""
        return f"{self.step}:{self.token}{layers}"


def cross_attention_layers(unet: nn.Module) -> list[str]:
    """Names of every cross-attention module (`...attn2`), in the order the U-Net runs them: down, mid, up."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(names, key=lambda name: order.get(name.split(".")[0], 3))


def paper_layers(unet: nn.Module) -> tuple[str, ...]:
    """The paper's layers: the first two cross-attentions of the down path at the highest attention resolution.

    SD1 and SD2: down_blocks.0.attentions.{0,1}; SDXL: down_blocks.1.attentions.{0,1}; the first transformer block of
    each (BE-PRSS, controller.py, takes the two 64 x 64 ones of the down path).

    Raises:
        ValueError: a U-Net without cross-attention in its down path.
    """
    down = [name for name in cross_attention_layers(unet) if name.startswith("down_blocks.")]
    first = [name for name in down if ".transformer_blocks.0." in name]
    if not first:
        raise ValueError("the U-Net has no cross-attention in its down path")
    block = first[0].split(".")[1]
    return tuple(name for name in first if name.split(".")[1] == block)[:2]


def entropy_layer(unet: nn.Module) -> str | None:
    """Ren et al.'s layer for the entropy score, down_blocks.1.attentions.1; None where a U-Net has none."""
    name = "down_blocks.1.attentions.1.transformer_blocks.0.attn2"
    return name if name in dict(unet.named_modules()) else None


class AttentionCapture:
    """What the hooks of one U-Net call saw.

    Attributes:
        masks: mask per layer, [B, h, w] each, float32.
        token_means: attention over tokens averaged over heads and pixels, [B, L], of the `token_layers`.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.token_means: dict[str, Tensor] = {}

    def mask(self, size: tuple[int, int]) -> Tensor:
        """The layers' masks brought to `size` and averaged, [B, H, W], float32."""
        return torch.stack([resize_mask(mask, size) for mask in self.masks.values()]).mean(0)


@contextmanager
def capture_attention(
    unet: nn.Module,
    layers: tuple[str, ...],
    eos_positions: Tensor,
    latent_size: tuple[int, int],
    token: Token = "eos",
    token_layers: tuple[str, ...] = (),
) -> Iterator[AttentionCapture]:
    """Capture attention during the U-Net calls inside the block.

    The hooks see the inputs of the layers and compute softmax(Q K^T) beside them in float32; the model's own (fused)
    attention runs untouched, so its output is bit-identical. They are removed on the way out, errors included.

    Args:
        unet: the denoising network.
        layers: cross-attention modules to read masks from.
        eos_positions: index of the first end-of-text token of each prompt, [B], int64.
        latent_size: (H, W) of the latents; gives a layer's map its aspect.
        token: whose attention the mask is.
        token_layers: modules whose mean attention over tokens is kept as well.

    Raises:
        ValueError: a layer the U-Net does not have.
    """
    modules = dict(unet.named_modules())
    unknown = [name for name in (*layers, *token_layers) if name not in modules]
    if unknown:
        known = ", ".join(cross_attention_layers(unet))
        raise ValueError(f"the U-Net has no cross-attention layer {unknown[0]!r}; it has {known}")
    seen = AttentionCapture()

    def hook_for(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            encoded: Tensor = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            probabilities = _layer_probabilities(module, hidden, encoded)  # [B, heads, HW, L]
            if name in layers:
                column = _token_attention(probabilities.mean(1), eos_positions, token)
                seen.masks[name] = column.unflatten(-1, _map_size(column.shape[-1], latent_size))
            if name in token_layers:
                seen.token_means[name] = probabilities.mean((1, 2))

        return hook

    handles = [
        modules[name].register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name in dict.fromkeys((*layers, *token_layers))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _layer_probabilities(module: Any, hidden: Tensor, encoded: Tensor) -> Tensor:
    if module.norm_cross:
        encoded = module.norm_encoder_hidden_states(encoded)
    query, key = module.to_q(hidden), module.to_k(encoded)
    split = lambda x: x.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # noqa: E731
    return attention_probabilities(split(query), split(key), module.scale)


def _token_attention(probabilities: Tensor, eos_positions: Tensor, token: Token) -> Tensor:
    """[B, HW, L] -> [B, HW]: the attention paid to one token (or to EOS and all padding after it)."""
    if token == "bos":
        return 1 - probabilities[..., 0]
    eos = eos_positions.to(probabilities.device)
    if token == "eos":
        return probabilities[torch.arange(len(eos), device=eos.device), :, eos]
    after = torch.arange(probabilities.shape[-1], device=eos.device)[None] >= eos[:, None]
    return (probabilities * after[:, None]).sum(-1)


def _map_size(pixels: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a layer's map with this many pixels, halved from the latents' size as the U-Net does."""
    height, width = latent_size
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ValueError(f"an attention map of {pixels} pixels does not fit latents of {latent_size}")
    return height, width
