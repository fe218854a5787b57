"""`bench_million` in its quick form: it scans, measures and goes on; no speed is asserted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import bench_million


@pytest.mark.timeout(600)
def test_a_scan_with_an_instant_scorer_is_whole_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_million", "--rows", "12000"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])  # for its processes; installed first
    few = ("report of 1,000, no HTML",)  # each in a process of its own
    monkeypatch.setattr(bench_million, "READERS", {name: bench_million.READERS[name] for name in few})
    bench_million.main()
    said = capsys.readouterr().out
    assert "12,000 rows in 12 shards" in said and "resumed with one shard to do" in said
    assert all(re.search(rf"{name}: [\d.]+ s, peak [\d,]+ MiB", said) for name in few)
    assert len(re.findall(r"(first|last) tenth: +[\d,]+ rows/s, resident [\d,]+ MiB", said)) == 2
