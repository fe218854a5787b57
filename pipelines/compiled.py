"""torch.compile of a denoiser, part by part: each is compared with the plain part, and stays it where that fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from pipelines.model import DiffusionModel

AFTER, OF = 16, 64  # calls in a shape among the last ones for which it is compiled: the last batch of a shard has fewer
BACKEND = "inductor"
Shape = tuple[tuple[torch.Size, torch.dtype], ...]
ENTRIES = 1024  # what torch keeps of one function; beyond its own 8 it computes plainly, without a word
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of a part's output from the plain one: rounding in the dtype, in another order."""


def compile_denoiser(model: DiffusionModel, say: Callable[[str], None]) -> list[CompiledPart]:
    """Have the parts of a denoiser compiled once they were called often enough; on CUDA with channels last, too.

    Args:
        say: told what stays plain, and why; a reason once.

    Returns:
        the parts; none where torch does not compile here.
    """
    said = set[str]()

    def once(name: str, why: str) -> None:
        reason = why.partition(" (")[0]
        if reason not in said:
            said.add(reason)
            say(f"--compile: {name}, and what fails like it, stays as it is: {why}")

    if model.device.type == "cuda":
        model.denoiser.to(memory_format=torch.channels_last)
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = ENTRIES
    read = {*model.layers(model.denoiser), *model.token_layers(model.denoiser)}
    parts = dict(_parts(model.denoiser, "", read))
    kinds = {type(part) for part in parts.values()}
    try:  # one function a class, compiled anew for every shape: equal parts share what is made of it
        forwards = {kind: torch.compile(kind.forward, dynamic=False, backend=BACKEND) for kind in kinds}
    except RuntimeError as error:  # a Python or a system that torch does not compile on
        once("the denoiser", _told(error))
        return []
    return [CompiledPart(name, part, forwards[type(part)], once) for name, part in parts.items()]


@contextmanager
def uncompiled(denoiser: nn.Module) -> Iterator[None]:
    """Inside the block every part computes plainly: what compiled ones are compared with."""
    parts = [part.forward for part in denoiser.modules() if isinstance(part.forward, CompiledPart)]
    for part in parts:
        part.off = True
    try:
        yield
    finally:
        for part in parts:
            part.off = False


class CompiledPart:
    """Takes the place of a part's `forward`.

    Once AFTER of the last OF calls had inputs of one shape it is compiled for that shape, and used from then on where
    it gave what the plain part gives; a shape that failed is computed plainly for good, and so is what gradients are
    asked of. A shape is that of all its tensors, with their dtypes.

    Args:
        name, part: of the denoiser. compiled: its class's forward. say: told the name and why a shape failed.

    Attributes:
        part: whose forward it is. compiled: shapes it is compiled for. failed: shapes where that did not work.
        off: it computes plainly, and counts nothing.
    """

    def __init__(
        self, name: str, part: nn.Module, compiled: Callable[..., Any], say: Callable[[str, str], None]
    ) -> None:
        self.name, self.say = name, say
        self.compiled, self.failed = set[Shape](), set[Shape]()
        self.off = False
        self._last: deque[Shape] = deque(maxlen=OF)
        self.part, self._plain, self._compiled = part, part.forward, compiled
        part.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.off or torch.is_grad_enabled():  # checkpoints compute a part twice, and compare what it kept
            return self._plain(*args, **kwargs)
        shape = tuple((value.shape, value.dtype) for value in _tensors((args, kwargs)))
        self._last.append(shape)
        if shape in self.compiled:
            return self._compiled(self.part, *args, **kwargs)
        found = self._plain(*args, **kwargs)
        if shape not in self.failed and self._last.count(shape) >= AFTER:
            self._compile(shape, found, args, kwargs)
        return found

    def _compile(self, shape: Shape, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plain_values = _tensors(plain)
        if not all(bool(value.isfinite().all()) for value in plain_values):
            return  # nothing to compare with: another batch will tell
        try:
            found = _tensors(self._compiled(self.part, *args, **kwargs))
            why = "" if 0 < len(found) == len(plain_values) else "it gives something else than the plain part"
            for one, other in zip(found, plain_values, strict=False):
                off = float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-6))
                if not off <= TOLERANCE.get(other.dtype, TOLERANCE[torch.float32]):
                    why = f"its output is not the plain part's (off by {off:.2g})"
        except Exception as error:  # a compiler raises whatever it meets, and memory may be short for both at once
            why = _told(error)
        if not why:
            self.compiled.add(shape)
            return
        self.say(self.name, why)
        self.failed.add(shape)


def _parts(module: nn.Module, path: str, read: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts that no attention is read in, without single layers, and their names.

    torch does not call a hook that is set after a part around it was compiled.
    """
    for name, part in module.named_children():
        below = path + name
        if below in read:
            continue
        if isinstance(part, nn.ModuleList | nn.ModuleDict) or any(each.startswith(f"{below}.") for each in read):
            yield from _parts(part, f"{below}.", read)
        elif sum(any(True for _ in each.parameters(recurse=False)) for each in part.modules()) > 1:
            yield below, part


def _told(error: BaseException) -> str:
    """An error in a line; of torch's, what it wraps."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0][:200]}"


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [each for value in values for each in _tensors(value)] if isinstance(values, list | tuple) else []
