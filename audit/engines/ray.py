"""Run shards on a Ray cluster: one actor a device keeps the model and takes the next shard when it is free.

The run folder must be a place every node reaches (a shared file system or an object store).
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any

from audit.commits import Ledger
from audit.engines.local import Outcome, note_failure
from audit.errors import AuditError, Drained
from audit.progress import Progress
from audit.stopping import Stop


class ShardActor:
    """Lives in a Ray worker: opens the job once, then computes shards."""

    def __init__(self, run_url: str, stage: str, device: str, batch_size: int) -> None:
        from audit.jobs import open_job

        self.job = open_job(run_url, stage, device, batch_size)

    def compute(self, shard: int) -> int:
        """Compute and commit a shard; returns its rows."""
        return self.job(shard, lambda _: None).rows


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
        config: has device, batch_size and workers (0: one a GPU of the cluster, or one without GPUs).

    Raises:
        AuditError: Ray is not installed, the device is not there, or a worker said its input is bad.
        Drained: a stop was asked for.
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
    in_hand: dict[Any, tuple[Any, int]] = {}  # reference of a result -> its actor and shard
    actors: list[Any] = []

    def start() -> Any:
        actors.append(actor.remote(url, stage, device, config.batch_size))
        return actors[-1]

    def feed(worker: Any) -> None:
        if queue:
            shard = queue.popleft()
            in_hand[worker.compute.remote(shard)] = (worker, shard)

    try:
        for _ in range(min(config.workers or (gpus if on_gpu else 1), len(queue))):
            feed(start())
        while in_hand:
            if stop.requested:
                raise Drained
            ready, _ = ray.wait(list(in_hand), num_returns=1, timeout=0.5)
            for reference in ready:
                worker, shard = in_hand.pop(reference)
                try:
                    progress.add(ray.get(reference))
                    outcome.committed.append(shard)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, AuditError):
                        raise cause from None
                    if note_failure(ledger, shard, str(cause or error), max_retries, progress):
                        queue.append(shard)
                    else:
                        outcome.quarantined.append(shard)
                    if isinstance(error, ray.exceptions.RayActorError):  # it died: another takes its place
                        worker = start()
                feed(worker)
    finally:
        for worker in actors:
            ray.kill(worker)
        if started_here:
            ray.shutdown()
    return outcome
