"""Which machine of several this process is: the flags, else what Slurm says."""

from __future__ import annotations

import os
import sys

from audit.base.errors import AuditError


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size): the flags; without either, Slurm's array, step or both (said on stderr); else 0 of 1.

    Raises:
        AuditError: a rank that is not below the world size, a world size without a rank, or variables of Slurm's that
            say no rank.
    """
    if rank is None and world_size is None:
        return _slurm_rank()
    if rank is None and world_size != 1:
        raise AuditError(f"--world-size {world_size}: which of them is this? Give --rank too, or neither under Slurm")
    place, world = rank or 0, world_size or 1
    if not 0 <= place < world:
        raise AuditError(f"--rank {place}: must be below --world-size {world}")
    return place, world


def _slurm_rank() -> tuple[int, int]:
    """Array task by array task, and in each of them process by process of its step."""
    place, world, source = 0, 1, []
    for of_rank, of_world, find in (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", _array_place),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", lambda: _number("SLURM_PROCID")),  # a batch script has no step
    ):
        if of_rank in os.environ and of_world in os.environ:
            inner, size = find(), _number(of_world)
            if not 0 <= inner < size:
                raise AuditError(f"{of_rank}={os.environ[of_rank]}: is not one of {size}: give --rank and --world-size")
            place, world = place * size + inner, world * size
            source += [of_rank] if size > 1 else []
    if world > 1:
        said = " and ".join(source)
        print(f"rank {place} of {world} ({said}); --rank 0 --world-size 1 scans it all here", file=sys.stderr)
    return place, world


def _array_place() -> int:
    """Place of this task in an array such as 0-3, 5-11:2 or 0-9%4.

    Raises:
        AuditError: an array such as 1,2,5: Slurm tells a task how many there are, but not which.
    """
    task, count = _number("SLURM_ARRAY_TASK_ID"), _number("SLURM_ARRAY_TASK_COUNT")
    first, step = _number("SLURM_ARRAY_TASK_MIN", "0"), max(_number("SLURM_ARRAY_TASK_STEP", "1"), 1)
    last = first + (count - 1) * step
    if _number("SLURM_ARRAY_TASK_MAX", str(last)) != last or (task - first) % step:
        raise AuditError(
            f"SLURM_ARRAY_TASK_ID={task}: the array's ids do not follow one another evenly, so which part is this "
            "task's? Submit --array=0-N, or give --rank and --world-size"
        )
    return (task - first) // step


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError as error:
        raise AuditError(f"{name}={text}: is no number: give --rank and --world-size") from error
