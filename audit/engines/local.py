"""Run shards on this machine: in this process, or in one owned process a device, watched and replaced when it dies."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from audit.base.errors import AuditError, Damaged, ends_the_job
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.engines.job import Job, JobSpec
from audit.engines.overlap import HAND, Overlap
from audit.engines.retries import Outcome, Retries

DEATHS = 3  # workers that may die one after the other while they load
BEAT = 2.0  # seconds between two signs of life of a worker
SILENCE, LOADING = 60.0, 600.0  # seconds without one after which it is killed; while it loads a model
PARTING = 10.0  # seconds that workers have to end when a job does


def run_here(job: Job, retries: Retries, progress: Progress, stop: Stop) -> Outcome:
    """Run shards in this process; a failed one is tried again after the others.

    Raises:
        Drained: a stop was asked for; the shards in hand are dropped.
        Broken: too many shards failed in a row; the others are left as they are.
    """
    counted: collections.Counter[int] = collections.Counter()  # rows finished of the shards in hand

    def on_rows(shard: int, rows: int) -> None:
        counted[shard] += rows
        progress.add(rows)
        stop.check()

    with Overlap(job, on_rows) as overlap:
        while len(retries) or overlap.hand:
            stop.check()
            if retries.retired(0):
                retries.put_back([shard for shard in overlap.hand if shard not in overlap.writing])
                raise retries.broken()
            while len(overlap.hand) < HAND and (shard := retries.take(overlap.hand)) is not None:
                overlap.take(shard)
            ended = overlap.step(timeout=0.5)
            if ended is None:
                continue
            shard, made = ended
            if not isinstance(made, Exception):
                progress.add(made.rows - counted.pop(shard, 0))
                retries.done(0, shard)
            elif ends_the_job(made):
                raise made
            else:  # whatever a shard dies of, the others go on
                progress.add(-counted.pop(shard, 0))
                retries.failed(0, shard, f"{type(made).__name__}: {made}")
    return retries.outcome


def run_processes(
    command: Callable[[int], list[str]],
    workers: int,
    retries: Retries,
    progress: Progress,
    stop: Stop,
    batch_timeout: float = 0.0,
) -> Outcome:
    """Run shards in worker processes, each given more when it has fewer than HAND; ahead only while all have some.

    A worker speaks JSON lines: {"ready": true} when its model is loaded, {"rows": n, "shard": shard} as it goes,
    then {"done": shard, "rows": n} or {"failed": shard, "error": e}; and {"alive": true} every few seconds.
    One that dies (killed, out of memory, a crash of the driver) is replaced, and its shards are done again
    (`Retries.died`). So is one that was stopped or hangs: without a sign of life, or without a finished batch, for too
    long, it is killed.

    Args:
        command: worker number -> argv of a process that reads shard numbers from stdin.
        workers: how many. retries: the shards.
        batch_timeout: seconds without a finished batch after which a worker is killed; 0 never.

    Raises:
        Drained: a stop was asked for; the shards in hand are dropped.
        AuditError: a worker said its input is bad, or workers die again and again before they begin.
        Broken: no worker is left; the shards that are, are left as they are.
    """
    selector = selectors.DefaultSelector()
    pool: dict[int, _Worker] = {}
    never_ready = 0  # deaths in a row of workers that had not loaded their model

    def start(number: int) -> None:
        pool[number] = _Worker(number, command(number))
        stop.children.add(pool[number].process)
        selector.register(pool[number].output, selectors.EVENT_READ, number)
        feed(pool[number])

    def feed(worker: _Worker) -> None:
        while len(worker.hand) < HAND and not (worker.hand and len(retries) < workers):
            shard = retries.take(worker.hand)
            if shard is None:
                break
            if not worker.hand:
                worker.moved = time.monotonic()
            worker.hand[shard] = 0
            worker.send(shard)
        if not worker.hand:
            worker.send(None)

    def hear(worker: _Worker, said: dict[str, Any]) -> None:
        nonlocal never_ready
        if "alive" not in said:
            worker.moved = worker.heard
        if "ready" in said:
            worker.ready, never_ready = True, 0
        elif "done" in said:
            shard = int(said["done"])
            progress.add(int(said["rows"]) - worker.hand.pop(shard))
            retries.done(worker.number, shard)
        elif "failed" in said:
            shard = int(said["failed"])
            progress.add(-worker.hand.pop(shard))
            retries.failed(worker.number, shard, str(said["error"]))
        elif "rows" in said:
            worker.hand[int(said["shard"])] += int(said["rows"])
            progress.add(int(said["rows"]))
        elif "error_line" in said:
            worker.error = str(said["error_line"])
        if not ({"done", "failed"} & set(said)):
            return
        if "failed" in said and retries.replace(worker.number):  # it ends what it has in hand; another takes its place
            worker.send(None)
        elif not worker.ending:
            feed(worker)

    def bury(number: int) -> None:
        nonlocal never_ready
        worker = pool.pop(number)
        selector.unregister(worker.output)
        code = worker.end()
        stop.children.discard(worker.process)
        if code == 2 or (code == 3 and worker.error):
            raise (Damaged if code == 3 else AuditError)(worker.error or "a worker could not begin")
        if not worker.hand:
            return
        progress.add(-sum(worker.hand.values()))
        if worker.ready:
            why = worker.killed or f"worker died with exit code {code}"
            progress.add(sum(made.rows for made in retries.died(number, list(worker.hand), why).values()))
        else:
            retries.put_back(list(worker.hand))
            never_ready += 1
            why = worker.killed or f"a worker died with exit code {code}"
            progress.note(f"{why}, before its model was loaded")
            if never_ready >= max(DEATHS, workers):
                raise AuditError(f"{never_ready} workers in a row died while loading: try fewer --workers")

    try:
        while len(retries) or pool:
            for number in range(workers):
                if len(retries) and number not in pool and not retries.retired(number):
                    start(number)
            if not pool:
                raise retries.broken()
            ready = selector.select(timeout=0.5)
            stop.check()
            for key, _ in ready:
                messages = pool[key.data].listen()
                if messages is None:
                    bury(key.data)
                for said in messages or ():
                    hear(pool[key.data], said)
            for worker in pool.values():
                worker.kill_if_stuck(batch_timeout)
    finally:
        selector.close()
        _end_all(list(pool.values()))
        stop.children.difference_update(worker.process for worker in pool.values())
    return retries.outcome


def _end_all(workers: list[_Worker]) -> None:
    """Ask workers to end, and kill those that do not: nothing is lost with the shard one has in hand."""
    try:
        for worker in workers:
            worker.process.terminate()
            worker.send(None)
        until = time.monotonic() + PARTING
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(until - time.monotonic(), 0.0))
    finally:  # also where a second Ctrl-C does not want to wait
        for worker in workers:
            worker.process.kill()
            worker.end()


class _Worker:
    """One owned process and the shards it has in hand.

    Attributes:
        hand: shard -> rows of it that were finished, in the order the shards were given.
        ending: it was told to end with what it has in hand. killed: why it was, if it was.
    """

    def __init__(self, number: int, argv: list[str]) -> None:
        self.number = number
        self.hand: dict[int, int] = {}
        self.ready = self.ending = False
        self.error, self.rest, self.killed = "", b"", ""
        self.heard = self.moved = time.monotonic()  # the last sign of life; the last one of progress
        # a session of its own: Ctrl-C reaches the parent alone, which then ends its workers
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self.process.stdout is not None
        self.output: IO[bytes] = self.process.stdout

    def send(self, shard: int | None) -> None:
        """Hand over a shard; None lets the worker end."""
        assert self.process.stdin is not None
        self.ending = self.ending or shard is None
        if self.process.stdin.closed:
            return
        try:
            if shard is None:
                self.process.stdin.close()
            else:
                self.process.stdin.write(b"%d\n" % shard)
        except BrokenPipeError:
            pass  # it has died: listen() will say so

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
        now, limit = time.monotonic(), SILENCE if self.ready else LOADING
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
        self.send(None)  # an idle one waits for its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SILENCE)
        self.process.kill()
        code = self.process.wait()
        self.output.close()
        return code


def worker_argv(spec: JobSpec) -> list[str]:
    """argv of a worker process for a job."""
    return [sys.executable, "-m", "audit.engines.worker", spec.to_json()]


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent is killed, so that a killed scan leaves no worker behind."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG; SIGTERM would not end one that is stopped
