"""Which machine of several this process is: the flags, else what Slurm says."""

from __future__ import annotations

import os
import sys

from audit.base.errors import AuditError

_SLURM = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size): the flags; without either, Slurm's array or step (said on stderr); else 0 of 1.

    Raises:
        AuditError: a rank that is not below the world size, or a variable of Slurm's that is no number.
    """
    place, world, source = rank or 0, world_size or 1, "--rank"
    if rank is None and world_size is None:
        for of_rank, of_world in _SLURM:
            if of_rank in os.environ and of_world in os.environ:
                array = "ARRAY" in of_rank
                first = _number("SLURM_ARRAY_TASK_MIN", "0") if array else 0
                step = _number("SLURM_ARRAY_TASK_STEP", "1") if array else 1
                place, world, source = (_number(of_rank) - first) // max(step, 1), _number(of_world), of_rank
                break
    if not 0 <= place < world:
        raise AuditError(f"{source} {place}: must be below --world-size {world}")
    if source != "--rank" and world > 1:
        print(f"rank {place} of {world} ({source}); --rank 0 --world-size 1 scans it all here", file=sys.stderr)
    return place, world


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError as error:
        raise AuditError(f"{name}={text}: is no number: give --rank and --world-size") from error
