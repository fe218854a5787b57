"""Run shards on a Ray cluster: one actor a device keeps the model and takes the next shard when it is free.

The run folder must be a place every node reaches (a shared file system or an object store).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from audit.base.errors import AuditError, Drained, ends_the_job
from audit.base.garbage import look_seldom
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.engines.job import Job, JobSpec, Task
from audit.engines.overlap import HAND
from audit.engines.ray_cluster import Head, connected
from audit.engines.retries import Outcome, Retries


class ShardActor:
    """Lives in a Ray worker: opens the job once, with the first shard, then computes shards, HAND of them at a time.

    Each comes in a thread of its own; a step is one shard's at a time.
    """

    def __init__(self, spec: JobSpec) -> None:
        look_seldom()
        self.spec = spec
        self.job: Job | None = None
        self.reading, self.computing, self.writing = threading.Lock(), threading.Lock(), threading.Lock()

    def compute(self, shard: int) -> int:
        """Compute and commit a shard; returns its rows."""
        with self.reading:
            if self.job is None:  # not in __init__: what a constructor raises reaches the driver without its type
                self.job = self.spec.open()
            task = Task(self.job, shard)
            task.read()
        if task.made is None:
            with self.computing:
                task.compute(lambda _: None)
            with self.writing:
                task.write()
        assert task.made is not None
        return task.made.rows


def run_on_ray(
    spec: JobSpec, address: str | None, workers: int, retries: Retries, progress: Progress, stop: Stop
) -> Outcome:
    """Run shards on the cluster at an address, that of RAY_ADDRESS, else on one started here.

    An actor that dies, alone or with its node, or fails again and again is replaced, as a worker process is.

    Args:
        spec: the job. address: HOST:PORT of the head. workers: actors; 0 is one a GPU of the cluster, or one without
            GPUs. retries: the shards.

    Raises:
        AuditError: Ray is not installed, no cluster or device is there, or a worker said its input is bad.
        Drained: a stop was asked for, or the cluster's head is gone.
        Broken: no actor is left; the shards that are, are left as they are.
    """
    with connected(address) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        on_gpu = spec.device.startswith("cuda") or (spec.device == "auto" and gpus > 0)
        if on_gpu and not gpus:
            raise AuditError(f"--device {spec.device}: the Ray cluster has no GPU; try --device cpu")
        url = spec.run if "://" in spec.run else os.path.abspath(spec.run)
        spec = replace(spec, run=url, device="cuda" if on_gpu else spec.device)
        actor = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1, max_concurrency=HAND)(ShardActor)
        places = min(workers or (gpus if on_gpu else 1), len(retries))
        return _run_on_actors(ray, lambda: actor.remote(spec), places, retries, progress, stop)


def _run_on_actors(
    ray: Any, start: Callable[[], Any], places: int, retries: Retries, progress: Progress, stop: Stop
) -> Outcome:
    in_hand: dict[Any, tuple[int, int]] = {}  # reference of a result -> place of its actor, and shard
    actors: dict[int, Any] = {}
    head = Head(ray)

    def hand(place: int) -> list[int]:
        return [shard for at, shard in in_hand.values() if at == place]

    def feed(place: int) -> None:
        """Give an actor shards: the first one, others ahead only while there are some for every place."""
        while len(mine := hand(place)) < HAND and not (mine and len(retries) < places):
            shard = retries.take(mine)
            if shard is None:
                return
            if place not in actors:
                actors[place] = start()
            in_hand[actors[place].compute.remote(shard)] = (place, shard)

    def bury(place: int) -> list[int]:
        """End an actor; gives what it had in hand."""
        mine = hand(place)
        for reference in [each for each, (at, _) in in_hand.items() if at == place]:
            del in_hand[reference]
        ray.kill(actors.pop(place))
        return mine

    try:
        while len(retries) or in_hand:
            for place in range(places):
                if not retries.retired(place):
                    feed(place)
                if place in actors and not hand(place):
                    bury(place)  # an actor without work would keep its room from one that waits for some
            if not in_hand:
                raise retries.broken()
            if stop.requested:
                raise Drained
            if head.lost():
                progress.note(f"the Ray cluster's head at {head.address} no longer answers")
                raise Drained
            ready, _ = ray.wait(list(in_hand), num_returns=1, timeout=0.5)
            for reference in ready:
                place, shard = in_hand[reference]
                try:
                    progress.add(ray.get(reference))
                except ray.exceptions.RayActorError as error:
                    committed = retries.died(place, bury(place), str(getattr(error, "cause", None) or error))
                    progress.add(sum(made.rows for made in committed.values()))
                    continue
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, Exception) and ends_the_job(cause):
                        raise cause from None
                    del in_hand[reference]
                    retries.failed(place, shard, str(cause or error))
                    if retries.replace(place):  # another takes its place
                        retries.put_back(bury(place))
                    continue
                del in_hand[reference]
                retries.done(place, shard)
    finally:
        for worker in actors.values():
            ray.kill(worker)
    return retries.outcome
