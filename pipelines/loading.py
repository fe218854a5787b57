"""Load a found model so that what is scored is what is in its files: nothing missing, unknown, misshapen or random."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.adapters import load_inversion, merge_lora
from pipelines.configurations import model_class, naming, reading
from pipelines.errors import ModelError
from pipelines.float8 import check_device, to_float8
from pipelines.folders import ModelFolder, find_model
from pipelines.model import DiffusionModel, Embeddings, Part

__all__ = ["DiffusionModel", "Embeddings", "ModelFolder", "find_device", "find_model", "load", "resolve_dtype"]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.bfloat16,  # of what is not exchanged
}
"""The dtype that weights are loaded in."""
NATIVE = {
    "float16": {"avx512_fp16", "amx_fp16", "fphp"},
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float8": set(),
}
"""Words of Linux' /proc/cpuinfo, of x86 and ARM, one of which a CPU that computes in a lower precision has."""
HARMLESS = re.compile(r"(^|\.)(position_ids|num_batches_tracked)$")
"""Buffers of older libraries that nothing reads."""
HARMLESS_NUMBERS = 1 << 26
"""A network up to this size is built in any case: what is missing is then said by name."""


def load(folder: ModelFolder, device: str = "auto", dtype: str = "auto") -> DiffusionModel:
    """Load a found model onto a device.

    Args:
        folder: from `find_model`.
        device: `auto` (CUDA, then MPS, then CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto` (float16 on CUDA, else float32), `float32`, `float16`, `bfloat16`, or `float8`: the denoiser's
            attention and feed-forward in eight bits, all else in bfloat16.

    Raises:
        ModelError: a device this machine does not have, or that does not compute in the dtype; weights that cannot be
            read, or are not the ones the configuration describes: missing, unknown, misshapen, not finite; a tokenizer
            that does not fit.
    """
    import diffusers
    import transformers

    target = find_device(device)
    kind = DTYPES[resolve_dtype(dtype, target)]
    if dtype == "float8":
        check_device(target)
    full_mantissas()
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), naming(folder.name):
            warnings.simplefilter("ignore")
            pipeline = _load_checkpoint(folder, kind) if folder.checkpoint else _load_folder(folder, kind)
            for name in folder.parts():
                if name.startswith("tokenizer"):
                    check_tokenizer(pipeline, name, folder.family.ends_prompts)
            for path, token in folder.inversions:
                load_inversion(pipeline, path, token)
            for path, scale in folder.loras:
                merge_lora(pipeline, path, scale)
            pipeline.to(target)
            for name in folder.parts():
                part = getattr(pipeline, name)
                if isinstance(part, nn.Module):
                    check_finite(part, name)
                    part.eval().requires_grad_(False)
            if dtype == "float8":
                to_float8(getattr(pipeline, folder.family.denoiser_part))
            model = folder.family(pipeline, target, kind, folder.name)
            try_out(model)
            return model
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise whatever a wrong value leads to
        raise ModelError(f"{folder.name}: cannot be loaded: {first_line(error)}") from error


def full_mantissas() -> None:
    """Keep float32 what it says on NVIDIA's GPUs: torch lets cuDNN round convolutions to TF32, 10 bits, by default.

    Whatever the model's dtype, since VAEs of half-precision models decode in float32.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _load_folder(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The folder's pipeline, every part strictly."""
    parts = {name: _load_part(folder, name, part, dtype) for name, part in folder.parts().items()}
    return _assemble(folder, {**parts, "scheduler": folder.open_scheduler()})


def _assemble(folder: ModelFolder, parts: dict[str, Any]) -> Any:
    """diffusers' pipeline of loaded parts, with the switches of its index."""
    import diffusers

    kind = getattr(diffusers, folder.family.pipeline_class)
    takes = inspect.signature(kind.__init__).parameters
    switches = {name: value for name, value in folder.index.items() if isinstance(value, bool) and name in takes}
    absent = dict.fromkeys(name for name in folder.family.parts if name not in parts)
    return kind(**{**absent, **parts, **switches, **folder.family.pipeline_options})


def _load_part(folder: ModelFolder, name: str, part: Part, dtype: torch.dtype) -> Any:
    """One part: a tokenizer, or a network whose weights are all there and all used."""
    import transformers

    path = folder.path / name
    if name.startswith("tokenizer"):
        kind = getattr(transformers, folder.class_name(name) or part.classes[0])
        try:
            return kind.from_pretrained(path, local_files_only=True)
        except BaseException as error:  # its own tokenizers library raises bare ones, and panics
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ModelError(f"{name}/ cannot be read: {first_line(error)}") from error
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["torch_dtype" if part.library == "diffusers" else "dtype"] = dtype
    variant = folder.weights(name).variant
    if variant is not None:
        options["variant"] = variant
    check_amount(folder, name, part)
    try:
        loaded, info = model_class(part).from_pretrained(path, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"cannot be loaded: {name}/: {first_line(error)}") from error
    mismatched = [entry[0] if isinstance(entry, (tuple, list)) else str(entry) for entry in info["mismatched_keys"]]
    check_keys(name, list(info["missing_keys"]), list(info["unexpected_keys"]), mismatched)
    if part.library == "diffusers":
        cast(loaded, dtype)
    return loaded


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights to the dtype asked for: diffusers leaves them in the file's where the first of them is a buffer."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def check_amount(folder: ModelFolder, name: str, part: Part) -> None:
    """Refuse a configuration of more numbers than its files have bytes, before a library takes the memory for them.

    Raises:
        ModelError: its weights cannot all be there, or the class does not take the configuration.
    """
    numbers = _numbers(part, folder.path / name, (folder.path / name / "config.json").read_bytes())
    there = sum(file.stat().st_size for file in folder.weights(name).files)
    if numbers > max(there, HARMLESS_NUMBERS):
        raise ModelError(
            f"{name}/config.json describes a network of {numbers:,} numbers, but its weights have {there:,} bytes: "
            "not all of them can be there; download the model again"
        )


@lru_cache(maxsize=64)
def _numbers(part: Part, folder: Path, config: bytes) -> int:
    """How many numbers the network of a configuration has; `config` is what its file says now."""
    kind = model_class(part)
    with torch.device("meta"), reading(f"{folder.name}/config.json"):
        if part.library == "diffusers":
            network = kind.from_config(json.loads(config))
        else:
            network = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        return sum(parameter.numel() for parameter in network.parameters())


def check_keys(part: str, missing: list[str], unknown: list[str], misshapen: list[str]) -> None:
    """Refuse weights that are not the ones a configuration describes.

    Raises:
        ModelError: how many are missing, unknown and misshapen, the first of each, and a way out.
    """
    unknown = [key for key in unknown if not HARMLESS.search(key)]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    told = [f"{len(keys)} {kind} ({sorted(keys)[0]}, ...)" for kind, keys in kinds.items() if keys]
    if not told:
        return
    way = "save the model again with save_pretrained, or download it again"
    if any("lora" in key for key in unknown):
        way = "its LoRA was saved unfused: fuse it before saving, or give the plain model and --lora FILE"
    elif unknown and all(key.startswith("module.") for key in unknown):
        way = "it was saved from a DataParallel model: save model.module instead"
    raise ModelError(f"{part}/ has other weights than its config.json describes: {', '.join(told)}; {way}")


@torch.inference_mode()
def try_out(model: DiffusionModel) -> None:
    """One prediction, of what every scorer asks: values that nothing checks fail here, and not caption by caption.

    Raises:
        ModelError: there is none.
    """
    try:
        prompt = model.encode(["a"])
        Embeddings.concatenate([prompt, model.encode_empty()])
        level = model.levels(min(50, model.schedule.most_steps))[0]
        latents = model.noise_bank(1, 0).to(model.device, model.dtype)
        found = model.predict(latents, level, prompt, model.guidance_default)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        device = "" if model.device.type == "cpu" else f", or {model.device} fails, which another device would show"
        raise ModelError(
            f"its weights are loaded, but a first prediction fails: {said}: one of its config.json files has a value "
            f"that does not fit; download the model again{device}"
        ) from error
    if found.shape != latents.shape:
        raise ModelError(f"it predicts {list(found.shape[1:])}, where its latents are {list(latents.shape[1:])}")


def check_finite(part: nn.Module, name: str) -> None:
    """Raise ModelError where a weight is not finite."""
    bad = [key for key, value in part.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        dtype = str(next(part.parameters()).dtype).removeprefix("torch.")
        raise ModelError(f"{name}/ has {len(bad)} weights that are not finite in {dtype}, {bad[0]} the first")


def check_tokenizer(pipeline: Any, name: str, ends_prompts: bool = True) -> None:
    """A tokenizer against its text encoder: length, end token, rows; a length it lacks is the encoder's.

    Args:
        pipeline: loaded. name: of the tokenizer. ends_prompts: whether it closes prompts by an end token.

    Raises:
        ModelError: they do not fit.
    """
    tokenizer, encoder = getattr(pipeline, name), getattr(pipeline, name.replace("tokenizer", "text_encoder"))
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions
        if hasattr(pipeline, "tokenizer_max_length"):
            pipeline.tokenizer_max_length = min(pipeline.tokenizer_max_length, positions)
    partner, end = name.replace("tokenizer", "text_encoder"), tokenizer.eos_token_id
    ids = tokenizer("a")["input_ids"]
    if ends_prompts and (end is None or not ids or ids[-1] != end):
        raise ModelError(f"{name}/ does not end a prompt with its end token ({tokenizer.eos_token}, id {end})")
    rows = encoder.get_input_embeddings().num_embeddings
    highest = max([*tokenizer.get_vocab().values(), *ids])
    if highest >= rows:
        raise ModelError(f"{name}/ gives ids up to {highest}, but {partner}/ has embeddings for {rows}")
    said = getattr(encoder.config, "eos_token_id", None)
    if ends_prompts and said not in (
        None,
        end,
        2,
    ):  # 2 is what CLIP's configurations said by mistake, and its code expects
        raise ModelError(f"{name}/ ends prompts with id {end}, but {partner}/config.json says {said}")


def _load_checkpoint(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """A single file through diffusers' own conversion, with the loads it makes checked."""
    import diffusers

    kind = getattr(diffusers, folder.family.pipeline_class)
    with recorded_loads() as loads:
        pipeline = kind.from_single_file(
            str(folder.checkpoint),
            config=str(folder.path),
            local_files_only=True,
            torch_dtype=dtype,
            **folder.family.pipeline_options,
        )
    for name, part in folder.parts().items():
        network = getattr(pipeline, name)
        if not isinstance(network, nn.Module):
            continue
        if type(network).__name__ not in part.classes:
            raise ModelError(f"{name} is a {type(network).__name__}, not {' or '.join(part.classes)}")
        empty = [key for key, value in network.state_dict().items() if value.is_meta]
        missing, unknown = loads.get(id(network), ([], []))
        check_keys(name, empty + missing, unknown, [])
        if part.library == "diffusers":
            cast(network, dtype)
    parts = {name: getattr(pipeline, name) for name in folder.parts()}
    return _assemble(folder, {**parts, "scheduler": folder.open_scheduler()})


@contextmanager
def recorded_loads() -> Iterator[dict[int, tuple[list[str], list[str]]]]:
    """Missing and unknown keys of every `load_state_dict` inside the block, by id of the network.

    diffusers' conversion of single files loads without being strict and says nothing of what was missing.
    """
    found: dict[int, tuple[list[str], list[str]]] = {}
    plain = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keys = plain(self, *args, **kwargs)
        found[id(self)] = (list(keys.missing_keys), list(keys.unexpected_keys))
        return keys

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = plain  # type: ignore[method-assign]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__


def find_device(device: str) -> torch.device:
    """The torch device of a `--device` value. Raises ModelError when this machine has no such device."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ModelError(f"{device}: give auto, cpu, cuda, cuda:N or mps", "device")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"{device}: this machine has {torch.cuda.device_count()} CUDA devices; try cpu", "device")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("mps: this machine has no Apple GPU; try cpu", "device")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype's name that `auto` stands for on a device. Raises ModelError for an unknown one."""
    if dtype == "auto":
        return "float16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ModelError(f"{dtype}: give auto, {', '.join(DTYPES)}", "dtype")
    return dtype


def slow_dtype(dtype: str, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """One line where a CPU has no instructions for the lower precision asked for; empty where it has, or cannot say.

    `auto` never stands for one on a CPU.
    """
    if device.type != "cpu" or dtype not in NATIVE or not cpuinfo.is_file():
        return ""
    if NATIVE[dtype] & set(cpuinfo.read_text().split()):
        return ""
    return f"{dtype}: this CPU has no instructions for it: it is slower than float32 here, not faster"
