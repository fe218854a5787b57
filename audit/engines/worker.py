"""A worker process: opens the job it reads from stdin, computes the shards whose numbers follow, and so on."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from audit.base.errors import AuditError, Damaged, Drained, ends_the_job
from audit.base.garbage import look_seldom
from audit.base.stopping import Stop, stop_on_signals
from audit.engines.job import JobSpec
from audit.engines.keep import keeping
from audit.engines.overlap import Overlap
from audit.engines.processes import BEAT

IDLE, SOON = 0.5, 0.02  # seconds to wait for a shard with none in hand; for one in hand before looking for more


def main() -> int:
    """Serve jobs until stdin ends. Exit codes: 0, 2 bad input, 3 a damaged run, 75 stopped."""
    look_seldom()
    say = _take_stdout()
    _die_with_parent()
    threading.Thread(target=_beat, args=(say,), daemon=True, name="heartbeat").start()
    with stop_on_signals(aloud=False) as stop, keeping():

        def on_rows(shard: int, rows: int) -> None:
            try:
                say({"rows": rows, "shard": shard})
            except BrokenPipeError:
                raise Drained from None  # the parent is gone: nobody waits for this shard
            stop.check()

        given = _Given()
        try:
            while (spec := given.job(stop)) is not None:
                job = JobSpec.from_json(spec).open()
                say({"ready": True})
                with Overlap(job, on_rows) as overlap:
                    _serve(overlap, given, stop, say)
        except AuditError as error:
            say({"error_line": str(error)})
            return 3 if isinstance(error, Damaged) else 2
        except (Drained, BrokenPipeError, KeyboardInterrupt):
            return 75
    return 0


def _serve(overlap: Overlap, given: _Given, stop: Stop, say: Callable[[dict[str, Any]], None]) -> None:
    """Do the shards that are given until another job is, or nothing more. Raises what ends the job."""
    while given.more or overlap.hand:
        stop.check()
        for shard in given.take(wait=not overlap.hand):
            overlap.take(shard)
        ended = overlap.step(timeout=SOON) if overlap.hand else None
        if ended is None:
            continue
        shard, made = ended
        if not isinstance(made, Exception):
            say({"done": shard, "rows": made.rows})
        elif ends_the_job(made):
            raise made
        else:  # the parent decides whether it is tried again
            say({"failed": shard, "error": f"{type(made).__name__}: {made}"})


class _Given:
    """Lines from stdin, read in a thread so that a shard that comes later can be read while another is computed.

    Attributes:
        more: shards of this job may still come.
    """

    def __init__(self) -> None:
        self.more = True
        self._next: bytes | None = None  # a job that was read; None too once stdin has ended
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="shards").start()

    def _listen(self) -> None:
        rest = b""
        while data := os.read(0, 1 << 12):  # not sys.stdin: the interpreter waits for its lock when it ends
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def job(self, stop: Stop) -> str | None:
        """The next job (JSON), waited for; None when none will come. Raises Drained when a stop was asked for."""
        while self.more:
            stop.check()
            self.take(wait=True)
        line, self._next, self.more = self._next, None, self._next is not None
        return None if line is None else line.decode()

    def take(self, wait: bool) -> list[int]:
        """What has come since; where nothing has, wait for it for a moment."""
        found: list[int] = []
        with contextlib.suppress(queue.Empty):
            while self.more:
                line = self._lines.get(timeout=IDLE if wait and not found else 0)
                if line is None or line.startswith(b"{"):
                    self._next, self.more = line, False
                else:
                    found.append(int(line))
        return found


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent is killed, so that a killed scan leaves no worker behind."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG; SIGTERM would not end one that is stopped


def _take_stdout() -> Any:
    """Keep stdout for messages alone; what libraries print goes to stderr."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            messages.write(json.dumps(message) + "\n")
            messages.flush()

    return say


def _beat(say: Callable[[dict[str, Any]], None]) -> None:
    """Say again and again that this process runs: one that was stopped, or hangs with Python's lock held, does not."""
    while True:
        time.sleep(BEAT)
        try:
            say({"alive": True})
        except (OSError, ValueError):
            return  # the parent is gone


if __name__ == "__main__":
    sys.exit(main())
