"""Rows and shards of a scan that fail: an error in its place, another try, or given up; never a missing row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.stage import SCAN, Stage
from audit.scores.scan import ScanConfig
from tests.audit.conftest import Watched
from tests.command import be_audit
from tests.conftest import some_captions

pytestmark = pytest.mark.faults


@pytest.fixture
def config(sd1: str) -> ScanConfig:
    return ScanConfig(model=sd1)


@pytest.mark.parametrize("kind", ("raise", "nan"))
def test_a_row_that_always_fails_is_a_row_with_an_error(
    config: ScanConfig, six: Path, tmp_path: Path, watched: type[Watched], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(watched, "poison", (7,))
    monkeypatch.setattr(watched, "kind", kind)
    run = tmp_path / "run"
    arguments = ("scan", six, "-o", run, "--model", config.model, "--max-error-rate", 0.5)
    for _ in range(2):  # the second time from what is committed
        found = be_audit(*arguments)
        assert found.code == 3 and "4 scored, 1 duplicates, 0 empty, 1 failed." in found.out, found
        assert "excess rests on 4 captions: 1 of the 5 of its null maps could not be scored" in found.err
    rows = read_scores(Run.open(str(run))).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok", "error", "ok"]
    reason = (
        "ValueError: cannot be scored"
        if kind == "raise"
        else "scores are not finite: magnitude nan, ld nan, ld_energy nan, excess nan, excess_pca nan"
    )
    for row in rows:
        assert (row["error"], row["ld"] is None) == ((reason, True) if row["status"] == "error" else (None, False))
    assert be_audit("verify", run, "--deep").code == 0  # it is whole; that a row failed is no damage


def test_a_shard_with_too_many_failures_is_given_up_and_tried_again_when_asked(
    config: ScanConfig, six: Path, tmp_path: Path, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "poison", (7, 9))  # both rows of shard 1
    run = tmp_path / "run"
    arguments = ("scan", six, "-o", run, "--model", config.model, "--rows-per-shard", 2, "--max-shard-retries", 2)
    found = be_audit(*arguments)
    assert found.code == 3 and f"Given up: shards 1; why: be-audit status {run}" in found.err
    assert "scan shard 1: ShardFailed: 2 of 2 captions failed, the first: ValueError: cannot be scored" in found.err
    stage = Stage.open(Run.open(str(run)), SCAN)
    assert not (run / stage.file(1)).exists()
    assert sorted(stage.done()) == [0, 2]
    assert len(json.loads((run / "_attempts" / "scan" / "00001.json").read_text())) == 2
    status = be_audit("status", run)
    assert status.code == 3 and "shard 1 given up: ShardFailed: 2 of 2 captions failed" in status.out
    rows = read_scores(Run.open(str(run))).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "pending", "ok"]  # row 4 waits for its first occurrence
    monkeypatch.setattr(watched, "poison", ())
    found = be_audit(*arguments)
    assert found.code == 0 and "3 of 3 shards done (1 now" in found.out
    assert be_audit("status", run).code == 0 and be_audit("verify", run, "--deep").code == 0


def test_one_caption_that_always_fails_keeps_no_shard_from_being_done(
    config: ScanConfig, six: Path, tmp_path: Path, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few distinct captions are beside it; with a rate of 0 it does, and another rate lets it pass."""
    monkeypatch.setattr(watched, "poison", (7,))
    arguments = ("scan", six, "--model", config.model, "--rows-per-shard", 1, "--max-shard-retries", 1)
    found = be_audit(*arguments, "-o", tmp_path / "run")
    assert found.code == 3 and "6 of 6 shards done" in found.out
    assert "4 scored, 1 duplicates, 0 empty, 1 failed." in found.out
    strict = (*arguments, "-o", tmp_path / "strict", "--max-error-rate")
    found = be_audit(*strict, 0)
    assert found.code == 3 and "5 of 6 shards done" in found.out
    found = be_audit(*strict, 1)
    assert found.code == 3 and "6 of 6 shards done (1 now" in found.out


def test_a_device_that_breaks_stops_every_stage_and_never_exits_0(
    tmp_path: Path, sd1: str, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on everything fails: nothing is given up or goes on with what is missing, and all of it resumes."""
    pq.write_table(pa.table({"TEXT": some_captions(12)}), tmp_path / "x.parquet")
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number}.png")
    run, index = tmp_path / "run", tmp_path / "index"
    flags = ("--model", sd1, "--steps", 2, "--rows-per-shard", 1, "--max-error-rate", 0, "-o", run)
    scan = ("scan", tmp_path / "x.parquet", *flags)
    confirm = ("confirm", run, "--index", index, "--top-k", 12, "--max-error-rate", 0, "--ls-threshold", 0.1)
    monkeypatch.setattr("audit.verdicts.candidates.SHARD_IMAGES", 1)
    assert be_audit("index", "build", tmp_path / "pictures", "-o", index, "--sscd", "testbed").code == 0

    def breaks(*command: object, said: str = "8 shards failed one after the other") -> None:
        monkeypatch.setattr(watched, "poison", tuple(range(1, 77)))
        done = be_audit(*command)
        assert done.code == 3 and said in done.err, done
        assert "Given up" not in done.err and "given up" not in be_audit("status", run).out
        monkeypatch.setattr(watched, "poison", ())
        assert be_audit(*command).code == 0

    breaks(*scan, said="the null maps of excess cannot be made: ShardFailed: none of 12 captions could be scored")
    breaks(*scan, "--refine", 1)
    breaks(*confirm)
    assert be_audit("verify", run, "--deep").code == 0
    rows = read_scores(Run.open(str(run))).to_pylist()
    assert len(rows) == 12 and all(row["refined"] for row in rows)
    assert read_stage(Run.open(str(run)), "confirm", ["row_id"]).num_rows == 12  # type: ignore[union-attr]
