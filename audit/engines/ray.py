"""Run shards on a Ray cluster: one actor a device keeps the model and takes the next shard when it is free.

The run folder must be a place every node reaches (a shared file system or an object store).
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any

from audit.commits import Ledger
from audit.engines import Job, compute
from audit.engines.local import REPLACE, RETIRE, Outcome, broken, note_failure
from audit.errors import AuditError, Drained, ends_the_job
from audit.progress import Progress
from audit.stopping import Stop


class ShardActor:
    """Lives in a Ray worker: opens the job once, with the first shard, then computes shards."""

    def __init__(self, run_url: str, stage: str, device: str, batch_size: int, max_error_rate: float) -> None:
        self.settings = (run_url, stage, device, batch_size, max_error_rate)
        self.job: Job | None = None

    def compute(self, shard: int) -> int:
        """Compute and commit a shard; returns its rows."""
        if self.job is None:  # not in __init__: what a constructor raises reaches the driver without its type
            from audit.jobs import open_job

            self.job = open_job(*self.settings)
        return compute(self.job, shard, lambda _: None).rows


def run_on_ray(
    run_url: str,
    stage: str,
    config: Any,
    ledger: Ledger,
    shards: Sequence[int],
    max_retries: int,
    progress: Progress,
    stop: Stop,
) -> Outcome:
    """Run shards on the cluster that RAY_ADDRESS names, else on one started here.

    Args:
        config: has device, batch_size, max_error_rate and workers (0: one a GPU of the cluster, or one without GPUs).

    An actor that dies or fails REPLACE shards in a row is replaced, and after RETIRE its place stays empty.

    Raises:
        AuditError: Ray is not installed, the device is not there, or a worker said its input is bad.
        Drained: a stop was asked for.
        Broken: no actor is left; the shards that are, are left as they are.
    """
    try:
        import ray
    except ImportError as error:
        raise AuditError("--engine ray: Ray is not installed: pip install 'be-audit[ray]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    url = run_url if "://" in run_url else os.path.abspath(run_url)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)
    if on_gpu and not gpus:
        raise AuditError(f"--device {config.device}: the Ray cluster has no GPU; try --device cpu")
    device = "cuda" if on_gpu else config.device
    actor = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1)(ShardActor)
    outcome, queue = Outcome(), collections.deque(shards)
    in_hand: dict[Any, tuple[int, int]] = {}  # reference of a result -> place of its actor, and shard
    actors: dict[int, Any] = {}
    free = list(range(min(config.workers or (gpus if on_gpu else 1), len(queue))))
    tried: set[int] = set()
    streaks: collections.Counter[int] = collections.Counter()  # of a place: failures in a row, at first tries

    def feed(place: int) -> None:
        if place not in actors:
            actors[place] = actor.remote(url, stage, device, config.batch_size, config.max_error_rate)
        shard = queue.popleft()
        in_hand[actors[place].compute.remote(shard)] = (place, shard)

    try:
        while queue or in_hand:
            while queue and free:
                feed(free.pop())
            if not in_hand:
                raise broken(len(queue))
            if stop.requested:
                raise Drained
            ready, _ = ray.wait(list(in_hand), num_returns=1, timeout=0.5)
            for reference in ready:
                place, shard = in_hand.pop(reference)
                try:
                    progress.add(ray.get(reference))
                    outcome.committed.append(shard)
                    streaks[place] = 0
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, Exception) and ends_the_job(cause):
                        raise cause from None
                    streaks[place] += shard not in tried
                    tried.add(shard)
                    if note_failure(ledger, shard, str(cause or error), max_retries, progress):
                        queue.append(shard)
                    else:
                        outcome.quarantined.append(shard)
                    if isinstance(error, ray.exceptions.RayActorError) or streaks[place] >= REPLACE:
                        ray.kill(actors.pop(place))  # another takes its place
                if streaks[place] < RETIRE:
                    free.append(place)
    finally:
        for worker in actors.values():
            ray.kill(worker)
        if started_here:
            ray.shutdown()
    return outcome
