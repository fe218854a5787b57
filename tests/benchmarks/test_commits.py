"""`bench_commits` in its quick form: both ways find every commit, on a disk and on a store; no speed is asserted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import bench_commits


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [["1200"], ["30", "--s3"]])
def test_both_ways_find_every_commit(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["bench_commits", *flags])
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])  # for its processes; installed first
    bench_commits.main()
    said = capsys.readouterr().out
    for name in ("first status", "next status", "resume", "read_scores"):
        assert len(re.findall(rf"{name}.* +[\d.]+ s \([\d.]+ busy\) +[\d,]+ MiB", said)) == 1, said
    assert said.count(" times") == 2
