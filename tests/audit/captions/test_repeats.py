"""Equal hashes found on disk: what a dict finds, in every number of parts; a full disk is one line."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import numpy as np
import pytest

from audit.base.errors import AuditError
from audit.captions import repeats
from audit.captions.repeats import Repeats


def found_by_a_dict(hashes: list[int]) -> dict[int, int]:
    """Row -> the first row like it, for rows that repeat one."""
    first: dict[int, int] = {}
    return {row: first[each] for row, each in enumerate(hashes) if each and first.setdefault(each, row) != row}


@pytest.mark.parametrize(("rows", "part_rows"), [(0, 10), (1, 10), (2, 1), (999, 1000), (1000, 300), (5000, 3)])
def test_every_repeat_is_found(monkeypatch: pytest.MonkeyPatch, rows: int, part_rows: int) -> None:
    monkeypatch.setattr(repeats, "PART_ROWS", part_rows)
    monkeypatch.setattr(repeats, "CHUNK", 64)
    drawn = np.random.default_rng(rows)
    different = drawn.integers(1, 1 << 64, max(rows // 2, 1), dtype=np.uint64)
    different[: len(different) // 10] = (0, 1, (1 << 64) - 1, 1 << 63)[rows % 4]  # empty captions, hashes at the ends
    hashes = drawn.choice(different, rows)
    made = Repeats(rows)
    for start in range(0, rows, 37):
        made.add(start, hashes[start : start + 37])
    made.resolve()
    expected = found_by_a_dict(hashes.tolist())
    assert made.count == len(expected)
    cuts = sorted({0, rows, *drawn.integers(0, rows + 1, 20).tolist()})
    for start, stop in [*itertools.pairwise(cuts), (0, rows), (rows, rows)]:
        of, first = made.between(start, stop)
        assert of.tolist() == sorted(row for row in expected if start <= row < stop)
        assert first.tolist() == [expected[row] for row in of.tolist()]


def test_no_room_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = Repeats(100_000)
    made.add(0, np.arange(1, 100_001, dtype=np.uint64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            AuditError, match=rf"^{tmp_path}/[^\n]*100,000 rows takes some 1.6 MB to 3.2 MB[^\n]*TMPDIR[^\n]*$"
        ):
            made.resolve()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    del made
    assert not list(tmp_path.iterdir()), "it left its files behind"
