"""Run shards on this machine: in this process, or in one owned process a device, watched and replaced when it dies."""

from __future__ import annotations

import collections
import selectors
from collections.abc import Callable, Sequence
from typing import Any

from audit.base.errors import AuditError, Damaged, ends_the_job
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.engines.job import Job, JobSpec
from audit.engines.keep import kept
from audit.engines.overlap import HAND, Overlap
from audit.engines.processes import WORKER, WorkerProcess, end_all
from audit.engines.retries import Outcome, Retries

DEATHS = 3  # workers that may die one after the other while they load


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
    spec: Callable[[int], JobSpec],
    workers: int,
    retries: Retries,
    progress: Progress,
    stop: Stop,
    batch_timeout: float = 0.0,
    argv: Sequence[str] = WORKER,
) -> Outcome:
    """Run shards in worker processes, each given more when it has fewer than HAND; ahead only while all have some.

    A worker speaks JSON lines: {"ready": true} when its model is loaded, {"rows": n, "shard": shard} as it goes,
    then {"done": shard, "rows": n} or {"failed": shard, "error": e}; and {"alive": true} every few seconds.
    One that dies (killed, out of memory, a crash of the driver) is replaced, and its shards are done again
    (`Retries.died`). So is one that was stopped or hangs: without a sign of life, or without a finished batch, for too
    long, it is killed. Those of a command that keeps them (`keeping`) are given its next stage's job.

    Args:
        spec: worker number -> its job.
        workers: how many. retries: the shards.
        batch_timeout: seconds without a finished batch after which a worker is killed; 0 never.
        argv: of a worker, as WorkerProcess says.

    Raises:
        Drained: a stop was asked for; the shards in hand are dropped.
        AuditError: a worker said its input is bad, or workers die again and again before they begin.
        Broken: no worker is left; the shards that are, are left as they are.
    """
    selector = selectors.DefaultSelector()
    pool: dict[int, WorkerProcess] = {}
    command = kept()
    idle = {} if command is None else command.workers
    never_ready = 0  # deaths in a row of workers that had not loaded their model

    def start(number: int) -> None:
        worker = idle.pop(number, None)
        if worker is not None and worker.process.poll() is not None:  # it died meanwhile
            worker.end()
            worker = None
        worker = pool[number] = worker or WorkerProcess(number, argv)
        stop.children.add(worker.process)
        selector.register(worker.output, selectors.EVENT_READ, number)
        worker.begin(spec(number).to_json())

    def feed(worker: WorkerProcess) -> None:
        while len(worker.hand) < HAND and not (worker.hand and len(retries) < workers):
            shard = retries.take(worker.hand)
            if shard is None:
                break
            worker.give(shard)

    def hear(worker: WorkerProcess, said: dict[str, Any]) -> None:
        nonlocal never_ready
        if "alive" not in said:
            worker.moved = worker.heard
        if "ready" in said:
            worker.ready, worker.loaded, never_ready = True, True, 0
        elif "done" in said:
            shard = int(said["done"])
            progress.add(int(said["rows"]) - worker.hand.pop(shard))
            retries.done(worker.number, shard)
        elif "failed" in said:
            shard, worker.failed = int(said["failed"]), True
            progress.add(-worker.hand.pop(shard))
            retries.failed(worker.number, shard, str(said["error"]))
            if retries.replace(worker.number):  # it ends what it has in hand; another takes its place
                worker.let_end()
        elif "rows" in said:
            worker.hand[int(said["shard"])] += int(said["rows"])
            progress.add(int(said["rows"]))
        elif "error_line" in said:
            worker.error = str(said["error_line"])

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

    over = False
    try:
        while len(retries) or any(worker.hand for worker in pool.values()):
            for number in range(workers):
                if len(retries) and number not in pool and not retries.retired(number):
                    start(number)
                if number in pool and not pool[number].ending:
                    feed(pool[number])
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
        over = True
    finally:
        selector.close()
        sound = {number for number, worker in pool.items() if not (worker.failed or worker.ending)}
        stay = sound if over and command is not None else set()
        idle.update({number: pool[number] for number in stay})
        end_all([worker for number, worker in pool.items() if number not in stay])
        stop.children.difference_update(worker.process for worker in pool.values())
    return retries.outcome
