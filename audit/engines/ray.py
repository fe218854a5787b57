"""Run shards on a Ray cluster: one actor a device keeps the model and takes the next shard when it is free.

The run folder must be a place every node reaches (a shared file system or an object store).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from audit.base.errors import AuditError, Drained, ends_the_job
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.engines.job import Job, JobSpec, compute
from audit.engines.ray_cluster import Head, connected
from audit.engines.retries import Outcome, Retries


class ShardActor:
    """Lives in a Ray worker: opens the job once, with the first shard, then computes shards."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.job: Job | None = None

    def compute(self, shard: int) -> int:
        """Compute and commit a shard; returns its rows."""
        if self.job is None:  # not in __init__: what a constructor raises reaches the driver without its type
            self.job = self.spec.open()
        return compute(self.job, shard, lambda _: None).rows


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
        actor = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1)(ShardActor)
        places = min(workers or (gpus if on_gpu else 1), len(retries))
        return _run_on_actors(ray, lambda: actor.remote(spec), places, retries, progress, stop)


def _run_on_actors(
    ray: Any, start: Callable[[], Any], places: int, retries: Retries, progress: Progress, stop: Stop
) -> Outcome:
    in_hand: dict[Any, tuple[int, int]] = {}  # reference of a result -> place of its actor, and shard
    actors: dict[int, Any] = {}
    free, head = list(range(places)), Head(ray)

    def feed(place: int) -> None:
        if place not in actors:
            actors[place] = start()
        shard = retries.take()
        assert shard is not None
        in_hand[actors[place].compute.remote(shard)] = (place, shard)

    try:
        while len(retries) or in_hand:
            while len(retries) and free:
                feed(free.pop())
            for place in free:  # an actor without work would keep its room from one that waits for some
                if place in actors:
                    ray.kill(actors.pop(place))
            if not in_hand:
                raise retries.broken()
            if stop.requested:
                raise Drained
            if head.lost():
                progress.note(f"the Ray cluster's head at {head.address} no longer answers")
                raise Drained
            ready, _ = ray.wait(list(in_hand), num_returns=1, timeout=0.5)
            for reference in ready:
                place, shard = in_hand.pop(reference)
                try:
                    progress.add(ray.get(reference))
                    retries.done(place, shard)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, Exception) and ends_the_job(cause):
                        raise cause from None
                    retries.failed(place, shard, str(cause or error))
                    if isinstance(error, ray.exceptions.RayActorError) or retries.replace(place):
                        ray.kill(actors.pop(place))  # another takes its place
                if not retries.retired(place):
                    free.append(place)
    finally:
        for worker in actors.values():
            ray.kill(worker)
    return retries.outcome
