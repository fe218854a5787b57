"""The trade-off benchmark: its interpolation by hand, and a small run that is gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks.tradeoff import BASELINES, LOSSES, alignment_at, main


def test_alignment_is_read_where_similarity_first_falls_so_far() -> None:
    sscd, alignment = np.array([0.8, 0.9, 0.6, 0.2, 0.7]), np.array([0.5, 0.6, 0.4, 0.2, 0.1])
    assert alignment_at(sscd, alignment, 0.25) == pytest.approx(0.4)  # 0.6, a measured point
    assert alignment_at(sscd, alignment, 0.5) == pytest.approx(0.3)  # 0.4, half-way between 0.6 and 0.2
    assert np.isnan(alignment_at(sscd, alignment, 0.9))


def test_a_small_run_measures_every_point_once(tmp_path: Path) -> None:
    arguments = ["--quick", "--work", str(tmp_path)]
    main(arguments)
    table = pd.read_csv(tmp_path / "tables" / "mitigation.csv")
    points = 1 + len(LOSSES) + len(BASELINES)
    assert len(table) == 2 * points and set(table.kind) == {"global", "local"}
    assert ((table.sscd_low <= table.sscd) & (table.sscd <= table.sscd_high)).all()
    assert (tmp_path / "tables" / "mitigation.png").stat().st_size > 10_000
    page = (tmp_path / "tables" / "mitigation.md").read_text()
    assert "--quick" in page and page.count("| magnitude | 0.7 |") == 2
    measured = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert len(measured) == points
    lost = sorted(measured)[0]
    lost.unlink()
    main(arguments)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert set(again) == set(measured)
    assert [path for path in measured if again[path] != measured[path]] == [lost]
    assert pd.read_csv(tmp_path / "tables" / "mitigation.csv").equals(table)
