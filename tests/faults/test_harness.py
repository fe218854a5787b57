"""The short form of `make torture`: one fault of each kind where it hurts most, then the same rows as undisturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.harness import FAULTS, STAGES, STORE_FAULTS, Fault, World, disturb, together

pytestmark = pytest.mark.faults
AT_A_WRITE, NO_LINKS, FULL = FAULTS[1], FAULTS[2], FAULTS[6]
CASES = (
    [(stage, AT_A_WRITE) for stage in STAGES]
    + [("refine", FULL), ("scan", NO_LINKS)]
    + [("scan", fault) for fault in STORE_FAULTS]
)


@pytest.mark.parametrize("stage, fault", CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_disturbed_stage_loses_and_doubles_nothing(world: World, tmp_path: Path, stage: str, fault: Fault) -> None:
    run = tmp_path / "run"
    url = f"faulty://{run}" if fault in STORE_FAULTS else ""
    found = disturb(world, stage, [fault], run, random.Random(7), url)
    assert [outcome.problem for outcome in found] == [None], found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_disturbed_several_times(world: World, tmp_path: Path, stage: str) -> None:
    faults = [FAULTS[1], FAULTS[3], FAULTS[6], FAULTS[0]]
    found = disturb(world, stage, faults, tmp_path / "run", random.Random(3))
    assert found and all(outcome.problem is None for outcome in found), found


@pytest.mark.parametrize("stage", ("index", "report"))
def test_several_processes_at_one_folder_wait_for_each_other(world: World, tmp_path: Path, stage: str) -> None:
    found = together(world, stage, 4, tmp_path / "run")
    assert found.problem is None, found
