"""An owned worker process as its parent sees it: lines to it, messages from it, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

WORKER = (sys.executable, "-m", "audit.engines.worker")
BEAT = 2.0  # seconds between two signs of life of a worker
SILENCE, LOADING = 60.0, 600.0  # seconds without one after which it is killed; while it loads a model
PARTING = 10.0  # seconds that workers have to end when a job does


def end_all(workers: Sequence[WorkerProcess]) -> None:
    """Ask workers to end, those with shards in hand to drop them, and kill those that do not: nothing is lost."""
    try:
        for worker in workers:
            if worker.hand:
                worker.process.terminate()
            worker.let_end()
        until = time.monotonic() + PARTING
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(until - time.monotonic(), 0.0))
    finally:  # also where a second Ctrl-C does not want to wait
        for worker in workers:
            worker.process.kill()
            worker.end()


class WorkerProcess:
    """One process and the shards it has in hand.

    Args:
        number: of the worker. argv: of a process that reads lines from stdin: a JobSpec, numbers of its shards, perhaps
            another JobSpec once they are done, and so on until stdin ends.

    Attributes:
        hand: shard -> rows of it that were finished, in the order the shards were given.
        ready: its job is open. loaded: some job of it was. ending: it was told to end with what it has in hand.
        failed: a shard failed in it, so that no other job is given to it. killed: why it was, if it was.
        heard, moved: when it gave the last sign of life; when it last got on.
    """

    def __init__(self, number: int, argv: Sequence[str]) -> None:
        self.number = number
        self.hand: dict[int, int] = {}
        self.ready = self.loaded = self.ending = self.failed = False
        self.error, self.rest, self.killed = "", b"", ""
        self.heard = self.moved = time.monotonic()
        # a session of its own: Ctrl-C reaches the parent alone, which then ends its workers
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self.process.stdout is not None
        self.output: IO[bytes] = self.process.stdout

    def begin(self, spec: str) -> None:
        """Have it open a job; it has no shard in hand."""
        self.ready, self.heard, self.moved = False, time.monotonic(), time.monotonic()
        self._write(spec)

    def give(self, shard: int) -> None:
        """Hand over a shard of the job."""
        if not self.hand:
            self.moved = time.monotonic()
        self.hand[shard] = 0
        self._write(str(shard))

    def let_end(self) -> None:
        """Let it end with what it has in hand."""
        assert self.process.stdin is not None
        self.ending = True
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: listen() will say so
            self.process.stdin.write(f"{line}\n".encode())

    def listen(self) -> list[dict[str, Any]] | None:
        """What the worker has said by now; None when it has ended. Never waits once its output is ready."""
        data = os.read(self.output.fileno(), 1 << 16)
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [said for line in lines if isinstance(said := json.loads(line), dict)]

    def kill_if_stuck(self, batch_timeout: float) -> None:
        """Kill a worker that gives no sign of life, or finishes no batch, for too long: listen() then says it ended."""
        now, limit = time.monotonic(), SILENCE if self.loaded else LOADING
        if self.killed:
            return
        if now - self.heard > limit:
            self.killed = f"worker gave no sign of life for {limit:.0f} s (stopped, or hung) and was killed"
        elif batch_timeout and self.hand and self.ready and now - self.moved > batch_timeout:
            self.killed = f"worker finished no batch in {batch_timeout:.0f} s (--batch-timeout) and was killed"
        if self.killed:
            self.process.kill()

    def end(self) -> int:
        """Wait for the end of a worker that was told to end or has died, or end it, and give its exit code."""
        self.let_end()  # an idle one waits for its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SILENCE)
        self.process.kill()
        code = self.process.wait()
        self.output.close()
        return code
