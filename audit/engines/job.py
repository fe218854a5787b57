"""A job: the work of one stage with its model loaded, called with one shard after the other."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from audit.base.commits import Commit, Ledger
from audit.base.log import worker_log


class Job(Protocol):
    """A stage whose model is loaded: called with a shard, it computes, writes and commits it.

    `on_rows` is called as rows are finished and may raise Drained.
    """

    ledger: Ledger

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit: ...


@dataclass(frozen=True)
class JobSpec:
    """What a worker needs to open a job, wherever it runs.

    Attributes:
        opener: dotted name of a function of this JobSpec that gives the Job: `audit.scores.scan_shard:open_job`.
        run: path or URL of the run folder. device: torch device or `auto`.
        batch_size: latents at a time. max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    opener: str
    run: str
    device: str
    batch_size: int
    max_error_rate: float

    def open(self) -> Job:
        """The job with its model loaded.

        Raises:
            AuditError: the model is not the one the run was begun with, or cannot be loaded.
        """
        module, _, name = self.opener.partition(":")
        job: Job = getattr(importlib.import_module(module), name)(self)
        return job

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        return cls(**json.loads(text))


def compute(job: Job, shard: int, on_rows: Callable[[int], None]) -> Commit:
    """The shard's commit: that of another process which did it meanwhile, else of the work done now."""
    made = job.ledger.done([shard]).get(shard)
    if made is not None:
        return made
    log, where = worker_log(job.ledger.folder), {"stage": job.ledger.stage, "shard": shard}
    finished = 0

    def on_batch(rows: int) -> None:
        nonlocal finished
        finished += rows
        log.batch(**where, rows=finished)
        on_rows(rows)

    log.event("begin", **where)
    try:
        made = job(shard, on_batch)
    except BaseException as error:
        log.event("failed", **where, error=f"{type(error).__name__}: {error}"[:2000])
        raise
    log.event("done", **where, rows=made.rows, seconds=made.seconds)
    return made
