"""Configurations of a model's parts: read through their classes, and errors about the model where they are wrong."""

from __future__ import annotations

import importlib
import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError
from pipelines.files import read_json
from pipelines.model import Part


def model_class(part: Part) -> Any:
    """The class a part is loaded as."""
    return getattr(importlib.import_module(part.library), part.classes[0])


def from_config(kind: Any, config: Mapping[str, Any]) -> Any:
    """A diffusers model of a configuration. Raises ModelError: values its class does not take."""
    with reading(f"its configuration as a {kind.__name__}"):
        return kind.from_config(dict(config))


def read_config(folder: Path, part: str, kind: Part, name: str) -> dict[str, Any]:
    """A part's configuration through its class: what the file leaves out is the class's default."""
    given = read_json(folder, f"{part}/config.json", name)
    found = model_class(kind)
    if kind.library == "transformers":
        defaults = found.config_class().to_dict()
    else:
        signature = inspect.signature(found.__init__).parameters.values()
        defaults = {each.name: each.default for each in signature if each.default is not inspect.Parameter.empty}
    for key, value in given.items():
        if _of_another_kind(value, defaults.get(key)):
            value = textwrap.shorten(repr(value), 40)
            raise ModelError(
                f"{name}: {part}/config.json sets {key} to {value}, where {found.__name__} has values like "
                f"{defaults[key]!r}; download the model again"
            )
    return {**defaults, **given}


def _of_another_kind(value: Any, default: Any) -> bool:
    """Whether a value cannot be meant where a class's default is a number or a word; whole numbers may be a list's."""
    if isinstance(default, float) and isinstance(value, list):
        return True
    if isinstance(default, (int, float)):
        return isinstance(value, (str, dict))
    return isinstance(default, str) and isinstance(value, (int, float, dict))


def check_vae(config: Mapping[str, Any], channels: int, denoiser: str) -> None:
    """Refuse a VAE whose latents are not the denoiser's. Raises ModelError: naming the field."""
    if config["latent_channels"] != channels:
        raise ModelError(f"vae/ has latents of {config['latent_channels']} channels, but {denoiser}/ has {channels}")
    scale = config["scaling_factor"]
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ModelError(f"vae/config.json sets scaling_factor to {scale!r}, which no latents are divided by")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        if values is not None and (len(values) != channels or not all(math.isfinite(each) for each in values)):
            raise ModelError(f"vae/config.json sets {key} to no list of {channels} numbers")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a wrong value leads to into a ModelError about `what`: the libraries check little."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        first = (str(error).strip() or "no reason given").splitlines()[0][:400].rstrip(".")
        raise ModelError(f"{what} is not taken: {type(error).__name__}: {first}; download the model again") from error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a model's name before what a ModelError says, where it is not there yet."""
    try:
        yield
    except ModelError as error:
        if error.about != "model" or str(error).startswith(name):
            raise
        raise ModelError(f"{name}: {error}") from error
