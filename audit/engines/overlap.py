"""Shards in hand at once: the next is read and the last is written while one is computed, so that no device waits."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from audit.base.commits import Commit
from audit.engines.job import Job, Task

HAND = 3  # shards a worker has at once: one to compute next, one that is computed, one that is written


class Overlap:
    """Takes shards through the steps of one job: `read` and `write` in a thread each, `compute` in the caller's.

    A device, its libraries and the signals belong to one thread, so the caller computes. Leaving the `with` block
    waits for what is being written.

    Args:
        job: whose steps. on_rows: called with the shard and the rows of it that were finished; may raise Drained.

    Attributes:
        hand: the shards taken that have not ended, in the order they were taken. writing: those of them that are
            computed.
    """

    def __init__(self, job: Job, on_rows: Callable[[int, int], None]) -> None:
        self.job, self.on_rows = job, on_rows
        self.hand: list[int] = []
        self.writing: set[int] = set()
        self._to_read: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[tuple[Task, BaseException | None]] = queue.SimpleQueue()
        self._came: list[tuple[Task, BaseException | None]] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(tasks, step), name=name, daemon=True)
            for tasks, step, name in ((self._to_read, Task.read, "read"), (self._to_write, Task.write, "write"))
        ]

    def __enter__(self) -> Overlap:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(queue.Empty):  # nobody will compute them
            while True:
                self._to_read.get_nowait()
        for tasks in (self._to_read, self._to_write):
            tasks.put(None)
        for thread in self._threads:
            thread.join()

    def take(self, shard: int) -> None:
        """Take a shard in hand: it is read from now on."""
        self.hand.append(shard)
        self._to_read.put(Task(self.job, shard))

    def step(self, timeout: float | None = None) -> tuple[int, Commit | Exception] | None:
        """Compute the next shard that was read, or hear of one that ended: its commit, or what it died of.

        Args:
            timeout: seconds to wait for either.

        Returns:
            the shard that ended, or None; `Drained` where `on_rows` raised it.
        """
        with contextlib.suppress(queue.Empty):
            self._came.append(self._back.get(timeout=0 if self._came else timeout))
            while True:
                self._came.append(self._back.get_nowait())
        if not self._came:
            return None
        self._came.sort(key=_to_compute)  # what has ended is heard of first
        task, error = self._came.pop(0)
        if _to_compute((task, error)):
            try:
                task.compute(lambda rows: self.on_rows(task.shard, rows))
            except Exception as failed:
                error = failed.with_traceback(None)  # whose frames hold this one, and a batch
            else:
                self.writing.add(task.shard)
                self._to_write.put(task)
                return None
        if error is not None and not isinstance(error, Exception):
            raise error
        self.hand.remove(task.shard)
        self.writing.discard(task.shard)
        ended = task.made if error is None else error
        assert ended is not None
        return task.shard, ended

    def _serve(self, tasks: queue.SimpleQueue[Task | None], step: Callable[[Task], Any]) -> None:
        while (task := tasks.get()) is not None:
            error = None
            try:
                step(task)
            except BaseException as failed:  # the caller decides what it means
                error = failed.with_traceback(None)
            self._back.put((task, error))


def _to_compute(came: tuple[Task, BaseException | None]) -> bool:
    """Whether a task that came back from reading or writing is to be computed; it has ended otherwise."""
    return came[0].made is None and came[1] is None
