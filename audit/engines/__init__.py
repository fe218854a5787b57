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


class ShardFailed(Exception):
    """A shard was computed but may not be committed (too many failed rows)."""
