"""A stage's shards to the engine that was asked for: this process, worker processes, or Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

from audit.base.devices import find_devices
from audit.base.errors import AuditError
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.engines.job import JobSpec
from audit.engines.local import run_here, run_processes
from audit.engines.ray import run_on_ray
from audit.engines.retries import Outcome, Retries


class EngineConfig(Protocol):
    """What of a command's configuration says how its shards are run."""

    @property
    def device(self) -> str: ...
    @property
    def batch_size(self) -> int | Literal["auto"]: ...
    @property
    def engine(self) -> str: ...
    @property
    def ray_address(self) -> str | None: ...
    @property
    def workers(self) -> int: ...
    @property
    def max_error_rate(self) -> float: ...
    @property
    def compile(self) -> bool: ...
    @property
    def batch_timeout(self) -> float: ...
    @property
    def max_shard_retries(self) -> int: ...


def run_shards(
    opener: str, run: str, config: EngineConfig, retries: Retries, progress: Progress, stop: Stop
) -> Outcome:
    """Run shards on the engine the configuration names.

    Args:
        opener, run: of the job, as in JobSpec. config: engine, device and limits. retries: the shards.

    Raises:
        AuditError, Drained, Broken: as the engines do.
    """
    spec = JobSpec(opener, run, config.device, config.batch_size, config.max_error_rate, config.compile)
    if config.engine == "ray":
        return run_on_ray(spec, config.ray_address, config.workers, retries, progress, stop)
    if config.ray_address is not None:
        raise AuditError("--ray-address: goes with --engine ray")
    devices = find_devices(config.device, config.workers)
    if len(devices) == 1:
        return run_here(replace(spec, device=devices[0]).open(), retries, progress, stop)
    return run_processes(
        lambda number: replace(spec, device=devices[number % len(devices)]),
        len(devices),
        retries,
        progress,
        stop,
        config.batch_timeout,
    )
