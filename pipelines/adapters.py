"""What people add to a model: LoRA files merged into its weights, and textual inversion files with learned tokens."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
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
HEADER = "lora_adapter_metadata"
"""Where diffusers' save_lora_weights keeps peft's LoraConfig: JSON of PART.SETTING in the safetensors header."""
STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Settings the product is scaled by."""
SILENT = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
)
"""Settings that say how and where it was trained; the tensors are the same product whatever they are."""
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others, as pissa, change the weights merged into
}
"""Values of further settings that leave the product alone; so does whatever is off."""
CLIPS = {"clip_l": "", "clip_g": "_2"}
"""Tensors of a textual inversion of SDXL, one an encoder, and how the encoder's name ends."""
DOWN = re.compile(r"^(?P<module>.+?)(?:\.lora_A|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.weight$")


def merge_lora(pipeline: Any, path: Path, scale: float) -> None:
    """Merge a LoRA into a pipeline's weights: W + scale * alpha / rank * up @ down, in float32.

    Names of kohya's trainers and of diffusers and peft are read, through diffusers' own conversion. alpha is the
    file's `.alpha` tensor of the layer, or its header's (`HEADER`), or the rank where the file says none.

    Args:
        pipeline: loaded. path: .safetensors file. scale: of the whole file.

    Raises:
        ModelError: another kind of adapter, a key that fits no layer, or a setting of the header that changes the
            product: nothing is left out in silence.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            raw, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises types of its own
        raise ModelError(f"{path}: cannot be read: {error}", "lora") from error
    for mark, kind in NOT_UNDERSTOOD.items():
        if any(mark in key for key in raw):
            raise ModelError(f"{path}: is {kind}, which is not understood: merge it into the model first", "lora")
    pairs = _pairs(pipeline, raw, path, _settings(pipeline, header, path))
    if not pairs:
        raise ModelError(f"{path}: has no LoRA layers ({next(iter(raw), 'no tensors')}, ...)", "lora")
    for (part, module), (down, up, factor) in pairs.items():
        weight = _weight(getattr(pipeline, part, None), module)
        if weight is None:
            raise ModelError(f"{path}: {part}.{module} is no layer of this model: it was made for another one", "lora")
        change = _product(up.float(), down.float()) * (scale * factor)
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


def _settings(pipeline: Any, header: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Part -> peft's settings of its LoRA by the file's header; empty where it has none.

    Raises:
        ModelError: a setting that changes the product and is none of STRENGTH.
    """
    try:
        said = json.loads(header.get(HEADER, "{}"))
        found: dict[str, dict[str, Any]] = {}
        for name, value in said.items():
            part, _, setting = name.partition(".")
            if not isinstance(getattr(pipeline, part, None), nn.Module):
                raise ValueError(f"{name} is of no part of this model")
            found.setdefault(part, {})[setting] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: {HEADER} of its header is not understood: {error}", "lora") from error
    for part, settings in found.items():
        for setting, value in settings.items():
            if value and setting not in (*STRENGTH, *SILENT) and value not in PLAIN.get(setting, ()):
                raise ModelError(
                    f"{path}: its header sets {part}.{setting} to {value!r}, which changes more than the product of "
                    "its factors: merge it into the model first",
                    "lora",
                )
    return found


def _factor(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one layer by peft's settings, alpha / sqrt(rank) with `use_rslora` (peft, LoraLayer).

    Raises:
        ValueError: another rank than the factors', or values that are no numbers.
    """

    def of(setting: str, pattern: str, default: float) -> float:
        patterns = settings.get(pattern) or {}
        fits = [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]  # peft's get_pattern_key
        found = patterns[fits[0]] if fits else settings.get(setting, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise ValueError(f"{setting} {found!r} is no number")
        return found

    stated = of("r", "rank_pattern", rank)
    if stated != rank:
        raise ValueError(f"rank {stated:g}, where its factors have {rank}")
    alpha = of("lora_alpha", "alpha_pattern", 8)  # peft's default
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pairs(
    pipeline: Any, raw: dict[str, Tensor], path: Path, settings: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], tuple[Tensor, Tensor, float]]:
    """(part, module) -> down, up and their factor (alpha / rank) of every layer of a file; every tensor is used."""
    kind = type(pipeline)
    if not hasattr(kind, "lora_state_dict"):
        raise ModelError(f"{path}: diffusers has no LoRA for a {kind.__name__}", "lora")
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        converted = kind.lora_state_dict(dict(raw), **options)
    except Exception as error:  # the conversions raise whatever a name they do not know leads to
        reason = textwrap.shorten(str(error).strip() or type(error).__name__, 400)
        raise ModelError(f"{path}: its names are not understood: {reason}", "lora") from error
    state, alphas = converted[:2] if isinstance(converted, tuple) else (converted, None)  # transformers have no alphas
    alphas = alphas or {}
    left = {*state, *alphas}
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
        if alpha is not None and part in settings:
            raise ModelError(f"{path}: {stem}.alpha and its header both say how strong {stem} is", "lora")
        left -= {key, up_key, f"{stem}.alpha", f"{key}.alpha"}
        down, up = state[key], state[up_key]
        if min(down.ndim, up.ndim) < 2 or not 0 < down.shape[0] == up.shape[1]:
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise ModelError(f"{path}: {stem} has factors of shapes {shapes}, which do not multiply", "lora")
        rank = down.shape[0]
        try:
            stated = _factor(settings[part], module, rank) if part in settings else 1.0
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ModelError(f"{path}: {HEADER} of its header is not understood: {stem}: {error}", "lora") from error
        pairs[part, _module(module)] = (down, up, stated if alpha is None else float(alpha) / rank)
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
        ModelError: no such kind of file, another width, a token that is a word of the tokenizer's already, or vectors
            for another set of text encoders than the pipeline's.
    """
    from safetensors.torch import load_file

    if not hasattr(pipeline, "load_textual_inversion"):
        raise ModelError(f"{path}: {type(pipeline).__name__} takes no textual inversion", "textual_inversion")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        if isinstance(state, dict) and CLIPS.keys() & state.keys():
            for name, number in CLIPS.items():
                if name in state:
                    if not hasattr(pipeline, f"text_encoder{number}"):
                        raise ValueError(f"{name} is for text_encoder{number}, which this model does not have")
                    pair = {part: getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer")}
                    pipeline.load_textual_inversion({token: state[name]}, token=token, **pair)
        else:
            pipeline.load_textual_inversion(state, token=token)
        for name, tokenizer in pipeline.components.items():
            if name.startswith("tokenizer") and token not in tokenizer.get_vocab():
                encoder = name.replace("tokenizer", "text_encoder")
                raise ValueError(f"has no vectors of {token} for {encoder}: it was made for another model")
    except Exception as error:  # unpickling, safetensors and diffusers raise types of their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: {first}", "textual_inversion") from error
