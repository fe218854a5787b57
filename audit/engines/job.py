"""A job: the work of one stage with its model loaded, in three steps a shard: read, compute, write."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from audit.base.commits import Commit, Ledger
from audit.base.log import worker_log


class Job(Protocol):
    """A stage whose model is loaded. A shard goes through three steps, each of which takes what the last one gave.

    Steps of different shards run beside each other (audit.engines.overlap): `read` and `write` in threads of their own,
    each for one shard at a time, while `compute` has the device.

    Attributes:
        ledger: its commits. computing: what its second step is called among the seconds of a commit.
    """

    ledger: Ledger
    computing: str

    def read(self, shard: int) -> Any:
        """What a shard is computed from."""

    def compute(self, shard: int, rows: Any, on_rows: Callable[[int], None]) -> Any:
        """The shard's results. `on_rows` is called as rows are finished and may raise Drained."""

    def write(self, shard: int, found: Any, took: Took) -> Commit:
        """Write and commit the results."""


@dataclass
class Took:
    """Seconds of a shard's steps; what it waited between them does not count.

    Attributes:
        read, compute: whole steps. computing: name of the second. writing: when the third began (time.monotonic).
    """

    computing: str
    read: float = 0.0
    compute: float = 0.0
    writing: float = 0.0

    def seconds(self) -> dict[str, float]:
        """For the commit, which is about to be made: `read`, the second step by its name, and `wall`, all three."""
        wall = self.read + self.compute + time.monotonic() - self.writing
        return {"read": self.read, self.computing: self.compute, "wall": wall}


@dataclass(frozen=True)
class JobSpec:
    """What a worker needs to open a job, wherever it runs.

    Attributes:
        opener: dotted name of a function of this JobSpec that gives the Job: `audit.scores.scan_shard:open_job`.
        run: path or URL of the run folder. device: torch device or `auto`.
        batch_size: latents at a time, or `auto`.
        max_error_rate: a shard with a larger share of failed rows is not committed.
        compile: the denoiser is compiled.
    """

    opener: str
    run: str
    device: str
    batch_size: int | Literal["auto"]
    max_error_rate: float
    compile: bool = False

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


class Task:
    """One shard on its way through a job's steps, each logged and timed.

    Args:
        job, shard: what is done.

    Attributes:
        made: its commit, once there is one; another process may have made it.
    """

    def __init__(self, job: Job, shard: int) -> None:
        self.job, self.shard = job, shard
        self.made: Commit | None = None
        self._took, self._log = Took(job.computing), worker_log(job.ledger.folder)
        self._held: Any = None  # what the last step gave

    def read(self) -> None:
        """First step; none where another process has done the shard meanwhile."""
        self.made = self.job.ledger.done([self.shard]).get(self.shard)
        if self.made is None:
            started = time.monotonic()
            with self._failing():
                self._held = self.job.read(self.shard)
            self._took.read = time.monotonic() - started

    def compute(self, on_rows: Callable[[int], None]) -> None:
        """Second step. Whatever it raises is logged."""
        finished, started = 0, time.monotonic()

        def on_batch(rows: int) -> None:
            nonlocal finished
            finished += rows
            self._log.batch(self.job.ledger.stage, self.shard, rows=finished)
            on_rows(rows)

        self._log.begin(self.job.ledger.stage, self.shard)
        with self._failing():
            self._held = self.job.compute(self.shard, self._held, on_batch)
        self._took.compute = time.monotonic() - started

    def write(self) -> None:
        """Third step: the commit is `made` then."""
        self._took.writing = time.monotonic()
        with self._failing():
            self.made = self.job.write(self.shard, self._held, self._took)
        self._held = None
        facts = {"rows": self.made.rows, "seconds": self.made.seconds}
        self._log.end("done", self.job.ledger.stage, self.shard, **facts)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._held = None
            what = f"{type(error).__name__}: {error}"[:2000]
            self._log.end("failed", self.job.ledger.stage, self.shard, error=what)
            raise


def compute(job: Job, shard: int, on_rows: Callable[[int], None]) -> Commit:
    """A shard's steps one after the other; its commit, be it that of another process."""
    task = Task(job, shard)
    task.read()
    if task.made is None:
        task.compute(on_rows)
        task.write()
    assert task.made is not None
    return task.made
