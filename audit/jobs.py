"""From a stage's name to a job with its model loaded, and from there to the engine that runs its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.commits import Ledger
from audit.engines import Job
from audit.engines.local import Outcome, run_here, run_processes, worker_argv
from audit.errors import AuditError
from audit.progress import Progress
from audit.run import Run
from audit.stopping import Stop


def open_job(run_url: str, stage: str, device: str, batch_size: int, max_error_rate: float) -> Job:
    """Load a run's model and make the job of one of its stages (called once in every worker).

    Args:
        max_error_rate: a shard with a larger share of failed rows is not committed.

    Raises:
        AuditError: the model is not the one the run was begun with, or cannot be loaded.
    """
    from audit import testbed
    from pipelines.loading import ModelError, find_model, load

    run = Run.open(run_url)
    try:
        name = run.config["model"]
        folder = find_model(str(testbed.PIPELINE) if name == "testbed" else name, run.config["revision"])
        if folder.weights_sha256() != run.fingerprint["model"]["weights_sha256"]:
            raise AuditError(f"--model {name}: other weights than the run was begun with")
        model = load(folder, device, run.fingerprint["dtype"])
    except ModelError as error:
        raise AuditError(str(error)) from error
    if stage == "scan":
        from audit.scan_job import ScanJob

        return ScanJob(run, model, batch_size, max_error_rate)
    if stage == "mitigate":
        from audit.mitigate_job import MitigateJob

        return MitigateJob(run, model, batch_size, max_error_rate)
    from audit.trajectories import TrajectoryJob

    return TrajectoryJob(run, stage, model, batch_size, max_error_rate)


def run_stage(
    run: Run,
    stage: str,
    ledger: Ledger,
    shards: Sequence[int],
    config: Any,
    stop: Stop | None,
    rows: Mapping[int, int],
    unit: str,
    done: Mapping[int, Any],
) -> Outcome:
    """Run a stage's shards on the engine the configuration names.

    Args:
        config: has device, batch_size, workers, engine, max_error_rate and max_shard_retries.
        rows: rows by shard, of all shards. done: what is committed already.
    """
    if not shards:
        return Outcome()
    stop = stop or Stop()
    devices = find_devices(config.device, config.workers)
    before = sum(rows[shard] for shard in done)
    total = before + sum(rows[shard] for shard in shards)
    with Progress(total, unit, stage, before) as progress:
        if config.engine == "ray":
            from audit.engines.ray import run_on_ray

            return run_on_ray(run.url, stage, config, ledger, shards, config.max_shard_retries, progress, stop)
        if len(devices) == 1:
            job = open_job(run.url, stage, devices[0], config.batch_size, config.max_error_rate)
            return run_here(job, shards, config.max_shard_retries, progress, stop)

        def command(number: int) -> list[str]:
            device = devices[number % len(devices)]
            return worker_argv(run.url, stage, device, config.batch_size, config.max_error_rate)

        return run_processes(command, len(devices), ledger, shards, config.max_shard_retries, progress, stop)


def find_devices(device: str, workers: int) -> list[str]:
    """One device a worker: every CUDA device for `auto` and `cuda`, else the device named, `workers` times.

    A single entry means: in this process.
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        return [f"cuda:{number % count}" for number in range(workers or count)]
    return [device] * max(workers, 1)
