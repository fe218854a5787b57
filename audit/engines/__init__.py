"""Who calls a job's shards, and where: local.py (this process, or one process a GPU), ray.py (one actor a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from audit.commits import Commit, Ledger


class Job(Protocol):
    """A stage whose model is loaded: called with a shard, it computes, writes and commits it.

    `on_rows` is called as rows are finished and may raise Drained.
    """

    ledger: Ledger

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit: ...


def compute(job: Job, shard: int, on_rows: Callable[[int], None]) -> Commit:
    """The shard's commit: that of another process which did it meanwhile, else of the work done now."""
    return job.ledger.done([shard]).get(shard) or job(shard, on_rows)


def allowed_failures(rate: float, rows: int) -> float:
    """Failed rows with which a shard of `rows` is still committed: the rate, and one whatever the size.

    Without the one, a caption that always fails would keep a shard of few distinct captions from ever being done.
    """
    return max(rate * rows, 1.0) if rate else 0.0


class ShardFailed(Exception):
    """A shard was computed but may not be committed (too many failed rows)."""
