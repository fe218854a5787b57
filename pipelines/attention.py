"""Attention of image positions to a prompt's tokens (the BE mask), captured by hooks that leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ModelError
from pipelines.formulas import attention_probabilities, resize_mask

TOKENS: tuple[str, ...] = ("eos", "bos", "padding")
STEPS: tuple[str, ...] = ("first", "final", "energy", "none")
Reader = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor]
"""From a layer's inputs, its attention of image positions to text tokens: [B, heads, pixels, L], float32."""


@dataclass(frozen=True)
class MaskSource:
    """Where a mask is read from.

    Attributes:
        step: `first` (attention of the first step), `final` (of the last one, the paper's), `energy` (the smoothed
            energy map of the first step; layers and token play no part), `none` (a model without a readable one).
        token: `eos` (the paper's), `bos` (one minus its attention) or `padding` (everything from EOS on, summed).
        layers: names of attention modules, averaged; empty for the family's own, the paper's two (`paper_layers`).
    """

    step: str = "first"
    token: str = "eos"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"mask step {self.step!r} is none of {', '.join(STEPS)}")
        if self.token not in TOKENS:
            raise ValueError(f"mask token {self.token!r} is none of {', '.join(TOKENS)}")

    def describe(self) -> str:
        """One word for a table's `mask_source` column: `first:eos`, `final:eos`, `energy`, ..."""
        if self.step in ("energy", "none"):
            return self.step
        layers = f":{'+'.join(self.layers)}" if self.layers else ""
        return f"{self.step}:{self.token}{layers}"


def check_token(token: str, start_tokens: int) -> None:
    """Refuse a mask of a start token where prompts have none: it would be the first word's.

    Args:
        token: of a MaskSource. start_tokens: how many a model's prompts begin with (`DiffusionModel.fixed_tokens`).
    Raises:
        ModelError: `bos` of prompts without one.
    """
    if token == "bos" and not start_tokens:
        raise ModelError("bos: this model's prompts have no start token: give eos or padding", "mask_token")


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
    token: str = "eos",
    token_layers: tuple[str, ...] = (),
    known: list[str] | None = None,
    reader: Reader | None = None,
) -> Iterator[AttentionCapture]:
    """Capture attention during the denoiser's calls inside the block.

    The hooks see the inputs of the layers and compute softmax(Q K^T) beside them in float32; the model's own (fused)
    attention runs untouched, so its output is bit-identical. They are removed on the way out, errors included.

    Args:
        unet: the denoising network.
        layers: attention modules to read masks from.
        eos_positions: index of the first end-of-text token of each prompt, [B], int64.
        latent_size: (H, W) of the latents; gives a layer's map its aspect.
        token: whose attention the mask is.
        token_layers: modules whose mean attention over tokens is kept as well.
        known: modules that can be read; default every cross-attention. reader: how; default `cross_attention`.

    Raises:
        ValueError: a layer the denoiser does not have.
    """
    modules, read = dict(unet.named_modules()), reader or cross_attention
    readable = cross_attention_layers(unet) if known is None else known
    unknown = [name for name in (*layers, *token_layers) if name not in readable]
    if unknown:
        raise ValueError(f"the model has no attention layer {unknown[0]!r} to read; it has {', '.join(readable)}")
    seen = AttentionCapture()

    def hook_for(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            probabilities = read(module, args, kwargs)  # [B, heads, HW, L]
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


def cross_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reader of a U-Net's cross-attention: softmax(Q K^T) over all L keys, padding included."""
    query, key = _query_and_key(module, args, kwargs)
    return attention_probabilities(query, key, module.scale)


def masked_cross_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reader of cross-attention whose padding is masked by a bias, [B, 1, L] (PixArt, Sana)."""
    query, key = _query_and_key(module, args, kwargs)
    bias = kwargs.get("attention_mask")
    return attention_probabilities(query, key, module.scale, None if bias is None else bias[:, None])


def joint_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reader of joint attention with keys [image, text] (SD3): the text's columns, whose rows sum to less than 1."""
    image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]

    def heads(values: Tensor, norm: Any) -> Tensor:
        split = values.unflatten(-1, (module.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)

    query = heads(module.to_q(image), module.norm_q)
    keys = [heads(module.to_k(image), module.norm_k), heads(module.add_k_proj(text), module.norm_added_k)]
    return attention_probabilities(query, torch.cat(keys, 2), query.shape[-1] ** -0.5)[..., image.shape[1] :]


def _query_and_key(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    hidden = args[0] if args else kwargs["hidden_states"]
    encoded = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    if module.norm_cross:
        encoded = module.norm_encoder_hidden_states(encoded)
    query, key = module.to_q(hidden), module.to_k(encoded)
    if module.norm_q is not None:  # across all heads (Sana 1.5)
        query, key = module.norm_q(query), module.norm_k(key)
    query, key = (values.unflatten(-1, (module.heads, -1)).transpose(1, 2) for values in (query, key))
    return query, key


def _token_attention(probabilities: Tensor, eos_positions: Tensor, token: str) -> Tensor:
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
