"""Flags of every command whose shards go to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from audit.base.options import option

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class EngineFlags:
    """Where shards run, and how much may fail there."""

    engine: str = option("local", "Where shards run.", choices=ENGINES)
    ray_address: str | None = option(
        None, "With --engine ray: a cluster's address, HOST:PORT; default RAY_ADDRESS, else one is started here."
    )
    workers: int = option(0, "Worker processes; 0 is one a GPU.", min=0, max=1024)
    max_error_rate: float = option(
        0.05, "A shard with a larger share of failed rows (and more than one) is not committed.", min=0.0, max=1.0
    )
    max_shard_retries: int = option(3, "Tries of a shard before it is given up.", min=1)
    compile: bool = option(
        False,
        "Compile the denoiser's parts with torch.compile, which takes a while: for a long job on a GPU. A part that "
        "cannot be, or then computes something else, is named and stays as it is.",
    )
    batch_timeout: float = option(
        3600.0,
        "Seconds without a finished batch after which a worker process is killed and replaced, not by Ray; 0 never.",
        min=0.0,
    )
