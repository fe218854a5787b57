"""The arithmetic of the comparison with the authors' code, and what is said where their code is not there."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.compare_official import differences

ROOT = Path(__file__).parents[2]


def test_largest_differences_may_be_of_different_values() -> None:
    absolute, relative = differences(np.array([100.0, 2.0, 0.0]), np.array([101.0, 1.5, 0.0]))
    assert (absolute, relative) == (1.0, pytest.approx(1 / 3))


def test_a_difference_from_zero_has_no_relative_size() -> None:
    assert differences(np.array([0.25, 1.0]), np.array([0.0, 1.0])) == (0.25, math.inf)


@pytest.mark.parametrize("ours", [np.ones(3), np.array([1.0, np.nan])])
def test_other_shapes_and_values_that_are_not_finite_do_not_pass_for_agreement(ours: np.ndarray) -> None:
    with pytest.raises(ValueError):
        differences(ours, np.ones(2))


@pytest.mark.parametrize("official", ["", "OFFICIAL=tests"])
def test_without_their_code_make_says_so_and_installs_nothing(official: str, tmp_path: Path) -> None:
    command = ["make", "-C", str(ROOT), "compare", f"VENV={tmp_path / 'venv'}", *official.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is no clone of github.com/chenchen-usyd/BE-PRSS" in done.stdout
    assert not list(tmp_path.iterdir())
