"""Run shards on this machine: in this process, or in one owned process a device, watched and replaced when it dies."""

from __future__ import annotations

import collections
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from audit.commits import Ledger
from audit.engines import Job, compute
from audit.errors import AuditError, Broken, ends_the_job
from audit.progress import Progress
from audit.stopping import Stop

DEATHS = 3  # workers that may die one after the other while they load
REPLACE, RETIRE = 2, 8
"""Shards that fail one after the other at their first try: so many, and a worker is replaced; is not started again.
Bad data fail here and there; a broken device or driver fails everything at once, and would use up every shard's tries.
"""


@dataclass
class Outcome:
    """What became of the shards: committed now, and given up after the last try."""

    committed: list[int] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)


def run_here(job: Job, shards: Sequence[int], max_retries: int, progress: Progress, stop: Stop) -> Outcome:
    """Run shards one after the other in this process; a failed one is tried again after the others.

    Raises:
        Drained: a stop was asked for; the shard in hand is dropped.
        Broken: RETIRE shards failed in a row; the others are left as they are.
    """
    outcome, queue = Outcome(), collections.deque(shards)
    tried: set[int] = set()
    streak = 0  # failures in a row, of shards at their first try
    while queue:
        stop.check()
        if streak >= RETIRE:
            raise broken(len(queue))
        shard, counted = queue.popleft(), 0

        def on_rows(rows: int) -> None:
            nonlocal counted
            counted += rows
            progress.add(rows)
            stop.check()

        try:
            made = compute(job, shard, on_rows)
        except Exception as error:  # whatever a shard dies of, the others go on
            if ends_the_job(error):
                raise
            progress.add(-counted)
            streak += shard not in tried
            tried.add(shard)
            if note_failure(job.ledger, shard, f"{type(error).__name__}: {error}", max_retries, progress):
                queue.append(shard)
            else:
                outcome.quarantined.append(shard)
        else:
            progress.add(made.rows - counted)
            outcome.committed.append(shard)
            streak = 0
    return outcome


def broken(left: int) -> Broken:
    """What to raise when everything fails, with this many shards left."""
    return Broken(
        f"{RETIRE} shards failed one after the other on every worker: stopped with {left} shards left. Look at what "
        "failed (be-audit status), mend it, and give the same command again."
    )


def note_failure(ledger: Ledger, shard: int, error: str, max_retries: int, progress: Progress) -> bool:
    """Record a failed try; True when the shard is to be tried again."""
    tries = ledger.record_attempt(shard, error)
    again = tries < max_retries
    what = "will be tried again" if again else f"given up after {tries} tries"
    progress.note(f"{ledger.stage} shard {shard}: {error.splitlines()[0][:300]}; {what}")
    return again


def run_processes(
    command: Callable[[int], list[str]],
    workers: int,
    ledger: Ledger,
    shards: Sequence[int],
    max_retries: int,
    progress: Progress,
    stop: Stop,
) -> Outcome:
    """Run shards in worker processes, each given the next shard when it is free.

    A worker speaks JSON lines: {"ready": true} when its model is loaded, {"rows": n} as it goes,
    then {"done": shard, "rows": n} or {"failed": shard, "error": e}.
    One that dies (killed, out of memory, a crash of the driver) has its shard counted as failed and is replaced; so is
    one that fails REPLACE shards in a row, and after RETIRE its place stays empty.

    Args:
        command: worker number -> argv of a process that reads shard numbers from stdin.

    Raises:
        Drained: a stop was asked for; the shards in hand are dropped.
        AuditError: a worker said its input is bad, or workers die again and again before they begin.
        Broken: no worker is left; the shards that are, are left as they are.
    """
    outcome, queue = Outcome(), collections.deque(shards)
    selector = selectors.DefaultSelector()
    pool: dict[int, _Worker] = {}
    never_ready = 0  # deaths in a row of workers that had not loaded their model
    tried: set[int] = set()
    streaks: collections.Counter[int] = collections.Counter()  # of a worker: failures in a row, at first tries

    def start(number: int) -> None:
        pool[number] = _Worker(number, command(number))
        selector.register(pool[number].output, selectors.EVENT_READ, number)
        feed(pool[number])

    def feed(worker: _Worker) -> None:
        worker.shard = queue.popleft() if queue else None
        worker.counted = 0
        worker.send(worker.shard)

    def failed(worker: _Worker, shard: int, error: str) -> None:
        progress.add(-worker.counted)
        streaks[worker.number] += shard not in tried
        tried.add(shard)
        if note_failure(ledger, shard, error, max_retries, progress):
            queue.append(shard)
        else:
            outcome.quarantined.append(shard)

    def hear(worker: _Worker, said: dict[str, Any]) -> None:
        nonlocal never_ready
        if "ready" in said:
            worker.ready, never_ready = True, 0
        elif "done" in said:
            progress.add(int(said["rows"]) - worker.counted)
            outcome.committed.append(int(said["done"]))
            streaks[worker.number] = 0
            feed(worker)
        elif "failed" in said:
            failed(worker, int(said["failed"]), str(said["error"]))
            if streaks[worker.number] < REPLACE:
                feed(worker)
            else:  # it ends, and another takes its place
                worker.shard = None
                worker.send(None)
        elif "rows" in said:
            worker.counted += int(said["rows"])
            progress.add(int(said["rows"]))
        elif "error_line" in said:
            worker.error = str(said["error_line"])

    def bury(number: int) -> None:
        nonlocal never_ready
        worker = pool.pop(number)
        selector.unregister(worker.output)
        code = worker.end()
        if code == 2:
            raise AuditError(worker.error or "a worker could not begin")
        if worker.shard is None:
            return
        done = ledger.done([worker.shard])
        if done:  # it died between its commit and saying so
            progress.add(done[worker.shard].rows - worker.counted)
            outcome.committed.append(worker.shard)
        elif worker.ready:
            failed(worker, worker.shard, f"worker died with exit code {code}")
        else:
            queue.appendleft(worker.shard)  # not the shard's fault
            never_ready += 1
            progress.note(f"a worker died with exit code {code} before its model was loaded")
            if never_ready >= max(DEATHS, workers):
                raise AuditError(f"{never_ready} workers in a row died while loading: try fewer --workers")

    try:
        while queue or pool:
            for number in range(workers):
                if queue and number not in pool and streaks[number] < RETIRE:
                    start(number)
            if not pool:
                raise broken(len(queue))
            ready = selector.select(timeout=0.5)
            stop.check()
            for key, _ in ready:
                messages = pool[key.data].listen()
                if messages is None:
                    bury(key.data)
                for said in messages or ():
                    hear(pool[key.data], said)
    finally:
        selector.close()
        for worker in pool.values():
            worker.process.terminate()
        for worker in pool.values():
            worker.end()
    return outcome


class _Worker:
    """One owned process and the shard it has in hand."""

    def __init__(self, number: int, argv: list[str]) -> None:
        self.number, self.shard = number, None  # type: int, int | None
        self.counted, self.ready, self.error, self.rest = 0, False, "", b""
        # a session of its own: Ctrl-C reaches the parent alone, which then ends its workers
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self.process.stdout is not None
        self.output: IO[bytes] = self.process.stdout

    def send(self, shard: int | None) -> None:
        """Hand over a shard; None lets the worker end."""
        assert self.process.stdin is not None
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
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Wait for the end of a worker that was told to end or has died, and give its exit code."""
        self.send(None)  # an idle one waits for its input
        code = self.process.wait()
        self.output.close()
        return code


def worker_argv(run_url: str, stage: str, device: str, batch_size: int, max_error_rate: float) -> list[str]:
    """argv of a worker process for a stage of a run."""
    return [sys.executable, "-m", "audit.engines.worker", run_url, stage, device, str(batch_size), str(max_error_rate)]


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent is killed, so that a killed scan leaves no worker behind."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
