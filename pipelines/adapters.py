"""What people add to a model: LoRA files merged into its weights, and textual inversion files with learned tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ModelError

NOT_UNDERSTOOD = {
    "hada_": "LyCORIS LoHa",
    "lokr_": "LyCORIS LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with Tucker decomposition",
}
"""Kinds of adapters that are not W + scale * up @ down, by what their keys have."""
DOWN = re.compile(r"^(?P<module>.+?)(?:\.lora_A|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.weight$")


def merge_lora(pipeline: Any, path: Path, scale: float) -> None:
    """Merge a LoRA into a pipeline's weights: W + scale * alpha / rank * up @ down, in float32.

    Names of kohya's trainers and of diffusers and peft are read, through diffusers' own conversion.

    Args:
        pipeline: loaded. path: .safetensors file. scale: of the whole file.

    Raises:
        ModelError: another kind of adapter, or a key that fits no layer: nothing is left out in silence.
    """
    from safetensors.torch import load_file

    try:
        raw = load_file(path)
    except Exception as error:  # safetensors raises types of its own
        raise ModelError(f"{path}: cannot be read: {error}", "lora") from error
    for mark, kind in NOT_UNDERSTOOD.items():
        if any(mark in key for key in raw):
            raise ModelError(f"{path}: is {kind}, which is not understood: merge it into the model first", "lora")
    pairs = _pairs(pipeline, raw, path)
    if not pairs:
        raise ModelError(f"{path}: has no LoRA layers ({next(iter(raw), 'no tensors')}, ...)", "lora")
    for (part, module), (down, up, alpha) in pairs.items():
        weight = _weight(getattr(pipeline, part, None), module)
        if weight is None:
            raise ModelError(f"{path}: {part}.{module} is no layer of this model: it was made for another one", "lora")
        if min(down.ndim, up.ndim) < 2 or not 0 < down.shape[0] == up.shape[1]:
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise ModelError(f"{path}: {part}.{module} has factors of shapes {shapes}, which do not multiply", "lora")
        change = _product(up.float(), down.float()) * (scale * alpha / down.shape[0])
        if not change.isfinite().all():
            raise ModelError(f"{path}: {part}.{module} is not finite", "lora")
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            shapes = f"{tuple(change.shape)} for {tuple(weight.shape)}"
            raise ModelError(f"{path}: {part}.{module} has another shape ({shapes}): made for another model", "lora")
        with torch.no_grad():
            merged = weight.float() + change.reshape(weight.shape).to(weight.device)
            weight.copy_(merged.to(weight.dtype))


def _product(up: Tensor, down: Tensor) -> Tensor:
    """up @ down of a linear layer or a convolution, [out, in, ...]."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _pairs(pipeline: Any, raw: dict[str, Tensor], path: Path) -> dict[tuple[str, str], tuple[Tensor, Tensor, float]]:
    """(part, module) -> down, up and alpha of every layer of a file; every tensor is used."""
    kind = type(pipeline)
    if not hasattr(kind, "lora_state_dict"):
        raise ModelError(f"{path}: diffusers has no LoRA for a {kind.__name__}", "lora")
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        converted = kind.lora_state_dict(dict(raw), **options)
    except Exception as error:  # the conversions raise whatever a name they do not know leads to
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: its names are not understood: {first}", "lora") from error
    state, alphas = converted[:2] if isinstance(converted, tuple) else (converted, None)  # transformers have no alphas
    alphas = alphas or {}
    left = set(state)
    pairs: dict[tuple[str, str], tuple[Tensor, Tensor, float]] = {}
    for key in sorted(state):
        match = DOWN.match(key)
        if match is None:
            continue
        stem = match["module"]
        up_key = _up(key)
        if up_key not in state:
            raise ModelError(f"{path}: {key} has no partner {up_key}", "lora")
        part, _, module = stem.partition(".")
        said = {**state, **alphas}
        alpha = said.get(f"{stem}.alpha", said.get(f"{key}.alpha"))
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ModelError(f"{path}: {stem}.alpha is no number", "lora")
        left -= {key, up_key, f"{stem}.alpha"}
        down, up = state[key], state[up_key]
        rank = down.shape[0] if down.ndim else 0
        pairs[part, _module(module)] = (down, up, float(rank if alpha is None else alpha))
    if left:
        raise ModelError(f"{path}: {len(left)} tensors are not understood, {min(left)} the first", "lora")
    return pairs


def _up(key: str) -> str:
    """Name of the partner of a `down` tensor."""
    old, new = ("lora_A", "lora_B") if "lora_A" in key else ("down", "up")
    head, _, tail = key.rpartition(old)
    return f"{head}{new}{tail}"


def _weight(network: Any, name: str) -> Tensor | None:
    """The weight of a layer by any of the names LoRAs give it; None where there is no such layer.

    Older ones name attention by its processor (`to_q` in text encoders too), and transformers 5 has no `text_model.`.
    """
    if not isinstance(network, nn.Module):
        return None
    modules = dict(network.named_modules())
    for plain in (name, re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", name)):
        for written in (plain, plain.removeprefix("text_model."), f"text_model.{plain}"):
            weight = getattr(modules.get(written), "weight", None)
            if weight is not None:
                return weight
    return None


def _module(name: str) -> str:
    """A layer's name from the names of older LoRAs, whose attention processors held them."""
    if ".processor." in name:
        return re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name


def load_inversion(pipeline: Any, path: Path, token: str) -> None:
    """Give the tokenizers a learned token and the text encoders its vectors, as diffusers does.

    Raises:
        ModelError: no such kind of file, another width, or a token that is a word of the tokenizer's already.
    """
    from safetensors.torch import load_file

    if not hasattr(pipeline, "load_textual_inversion"):
        raise ModelError(f"{path}: {type(pipeline).__name__} takes no textual inversion", "textual_inversion")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        if isinstance(state, dict) and {"clip_l", "clip_g"} & set(state):  # SDXL: one tensor an encoder
            for name, number in (("clip_l", ""), ("clip_g", "_2")):
                if name in state:
                    pair = {part: getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer")}
                    pipeline.load_textual_inversion({token: state[name]}, token=token, **pair)
        else:
            pipeline.load_textual_inversion(state, token=token)
    except Exception as error:  # unpickling, safetensors and diffusers raise types of their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: {first}", "textual_inversion") from error
