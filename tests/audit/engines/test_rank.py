"""Which part of a run is this process's: variables as Slurm 22.05 sets them (`make cluster` asks a real one)."""

from __future__ import annotations

import pytest

from audit.base.errors import AuditError
from audit.engines.rank import find_rank


def array(task: int, count: int, first: int, last: int, step: int = 1) -> dict[str, str]:
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    return {
        f"SLURM_ARRAY_TASK_{name}": str(value)
        for name, value in zip(names, (task, count, first, last, step), strict=True)
    }


BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


def step(process: int, processes: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(process), "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": str(processes)}


@pytest.mark.parametrize(
    "slurm, expected",
    [
        ({}, (0, 1)),
        (BATCH, (0, 1)),
        (step(3, 4), (3, 4)),
        (BATCH | array(2, 4, 0, 3), (2, 4)),
        (BATCH | array(6, 4, 5, 8), (1, 4)),
        (BATCH | array(9, 4, 5, 11, 2), (2, 4)),
        (BATCH | array(7, 1, 7, 7), (0, 1)),
        (step(0, 1) | array(1, 2, 0, 1), (1, 2)),
        *(
            (step(process, 3) | array(4 + task, 2, 4, 5), (3 * task + process, 6))
            for task in (0, 1)
            for process in range(3)
        ),
    ],
)
def test_rank_from_slurm(monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str], expected: tuple[int, int]) -> None:
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert find_rank(None, None) == expected
    assert find_rank(1, 2) == (1, 2)
    assert find_rank(0, 1) == find_rank(0, None) == find_rank(None, 1) == (0, 1)


@pytest.mark.parametrize("task", [1, 2, 5])
def test_an_uneven_array_has_no_places(monkeypatch: pytest.MonkeyPatch, task: int) -> None:
    """--array=1,2,5: the first two would be taken for ranks 0 and 1, and rank 2 would be missing or somebody else."""
    for name, value in array(task, 3, 1, 5).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AuditError, match=f"SLURM_ARRAY_TASK_ID={task}: the array's ids do not follow"):
        find_rank(None, None)


def test_a_world_without_a_rank_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun every process would be rank 0, and the rows of the others nobody's."""
    with pytest.raises(AuditError, match="--world-size 4: which of them is this"):
        find_rank(None, 4)
    with pytest.raises(AuditError, match="--rank 2: must be below --world-size 2"):
        find_rank(2, 2)
    with pytest.raises(AuditError, match="--rank 1: must be below --world-size 1"):
        find_rank(1, None)
