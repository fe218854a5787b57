"""Command-line flags made from configuration classes, so that the two cannot drift apart."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

Config = TypeVar("Config")
LARGEST = 2**31 - 1  # of an integer flag that names no other: what tables and libraries can count to


def option(default: Any, help: str, **more: Any) -> Any:
    """A configuration field that is also a flag; `more` as in `options_from`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


class Finite(click.types.FloatParamType):
    """A float that is a number: not nan, not inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class FiniteRange(click.FloatRange):
    """A float within bounds; nan lies within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class NumberOr(click.IntRange):
    """A whole number within bounds, or one word."""

    def __init__(self, word: str, min: int, max: int) -> None:
        super().__init__(min, max)
        self.word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self.word:
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value} is neither a whole number of at least {self.min} nor {self.word}", param, ctx)


class CommaList(click.ParamType):
    """`a,b,c` as a tuple of strings."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, (tuple, list)):
            return tuple(value)
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


def options_from(*configs: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a click command with a flag (or argument) for every field of configuration dataclasses, each name once.

    A field's metadata says the rest: `help`, `short`, `envvar`, `choices`, `min`, `max`, `word` (what an
    integer may be instead), `argument`.
    """
    parameters: dict[str, Any] = {}
    for config in configs:
        hints = typing.get_type_hints(config)
        for place in dataclasses.fields(config):
            parameters.setdefault(place.name, _parameter(place, hints[place.name]))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for parameter in reversed(parameters.values()):
            command = parameter(command)
        return command

    return decorate


def given_beside(ctx: click.Context, config: type[Any]) -> str | None:
    """The first flag that was typed and that a configuration does not have; None where there is none."""
    known = {place.name for place in dataclasses.fields(config)}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in known and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            return parameter.opts[-1] if parameter.param_type_name == "option" else str(ctx.params[name])
    return None


def config_of(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from values as click or JSON give them; names it does not have are left out."""
    known = {place.name for place in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}
    )


def _parameter(place: dataclasses.Field[Any], hint: Any) -> Any:
    meta, kind, default = dict(place.metadata), _plain(hint), place.default
    if meta.get("argument") or place.default is dataclasses.MISSING:
        if kind is tuple:
            return click.argument(place.name, nargs=-1)
        return click.argument(place.name, required=False, default=default, envvar=meta.get("envvar"))
    names = [f"--{place.name.replace('_', '-')}", place.name]
    if "short" in meta:
        names.insert(0, meta["short"])
    shared: dict[str, Any] = {"help": meta.get("help", ""), "envvar": meta.get("envvar"), "default": default}
    if kind is bool and default is True:
        return click.option(f"{names[-2]}/--no-{names[-2][2:]}", place.name, show_default=True, **shared)
    if kind is bool:
        return click.option(*names, is_flag=True, **shared)
    if "choices" in meta:
        shared["type"] = click.Choice(list(meta["choices"]))
    elif kind is tuple:
        shared["type"] = CommaList()
    elif "word" in meta:
        shared["type"] = NumberOr(meta["word"], meta.get("min", -LARGEST), meta.get("max", LARGEST))
    elif kind is int:
        shared["type"] = click.IntRange(meta.get("min", -LARGEST), meta.get("max", LARGEST))
    elif "min" in meta or "max" in meta:
        shared["type"] = FiniteRange(meta.get("min"), meta.get("max"))
    else:
        shared["type"] = Finite() if kind is float else kind
    return click.option(*names, show_envvar=True, show_default=default not in (None, (), ""), **shared)


def _plain(hint: Any) -> Any:
    """`int | None` -> int, `tuple[str, ...]` -> tuple."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _plain(next(part for part in typing.get_args(hint) if part is not type(None)))
    return origin or hint
