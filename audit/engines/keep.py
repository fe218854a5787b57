"""What a command keeps between its stages: models that were loaded, worker processes that have theirs loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from audit.engines.processes import WorkerProcess, end_all


@dataclass
class Kept:
    """Attributes: models: by what they depend on. workers: idle ones, by number."""

    models: dict[object, Any] = field(default_factory=dict)
    workers: dict[int, WorkerProcess] = field(default_factory=dict)


_kept: ContextVar[Kept | None] = ContextVar("_kept", default=None)


def kept() -> Kept | None:
    """What is kept in the command that runs; None where it keeps nothing, and in its other threads."""
    return _kept.get()


@contextmanager
def keeping() -> Iterator[None]:
    """Decorates a command of several stages: what one of them has loaded serves the next ones. Workers end with it."""
    if _kept.get() is not None:  # a command within another
        yield
        return
    now = Kept()
    token = _kept.set(now)
    try:
        yield
    finally:
        _kept.reset(token)
        end_all(list(now.workers.values()))
