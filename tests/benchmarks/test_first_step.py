"""The benchmark of the first step in its quick form: every row of its table scores the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.benchmark
def test_every_way_gives_the_same_scores() -> None:
    options = "--shape tiny --captions 3 --batch-sizes 2 3 --rounds 1 --settings channels_last"
    command = [sys.executable, "-m", "tests.benchmarks.first_step", *options.split()]
    where = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == ["loop", "batches of 2", "batches of 3", "channels_last"]
    assert all(float(row[-1]) < 1e-4 for row in rows[2:5]) and all(float(row[1]) > 0 for row in rows[2:])
    assert 0 <= float(rows[5][-1]) < float("inf")  # may move scores by more (docs/scale.md): printed, held to no bound
