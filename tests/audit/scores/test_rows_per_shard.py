"""`--rows-per-shard auto`: what it is, that a number is stored, and that a run is gone on with whatever it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.captions import auto_rows_per_shard, plan_captions, rows_in_time
from audit.run.run import Run
from audit.run.verify import verify_run
from audit.scores.estimate import Estimate
from audit.scores.scan import ScanConfig, scan
from tests.command import be_audit, tree
from tests.conftest import some_captions


@pytest.mark.parametrize(
    "rows, each",
    [
        *[(1, 1024), (10**3, 1024), (10**6, 1024), (2 * 10**7, 1024), (20_480_000, 1024), (20_480_001, 1025)],
        *[(10**8, 5000), (10**9, 50_000), (2 * 10**9, 100_000)],
    ],
)
def test_as_many_rows_as_keep_shards_few(rows: int, each: int) -> None:
    assert auto_rows_per_shard(rows) == each
    assert -(-rows // each) <= 20_000


def test_five_minutes_of_a_measured_speed() -> None:
    assert (rows_in_time(100.0), rows_in_time(3.5), rows_in_time(0.1)) == (30_000, 1050, 1024)
    known = Estimate(10**9, 10**9, 0, 20_000, 50_000, 1e7, 100.0, 32, 0, shard_seconds=500.0, short_shard=30_000)
    assert known.lines(ScanConfig())[2] == (
        "shards           20,000 of 50,000 rows, each some 8.3 min on one worker: --rows-per-shard 30000 keeps it "
        "under 5.0 min"
    )
    assert replace(known, short_shard=None).lines(ScanConfig())[2] == "shards           20,000 of 50,000 rows"


def test_a_plan_of_many_rows_says_that_no_speed_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.captions.plan.LEAST_ROWS", 2)
    monkeypatch.setattr("audit.captions.plan.MOST_SHARDS", 5)
    pq.write_table(pa.table({"TEXT": some_captions(31)}), tmp_path / "x.parquet")
    options = {"caption_col": None, "keep_cols": None, "limit": None, "staging": Folder(tmp_path / "run")}
    plan = plan_captions([str(tmp_path / "x.parquet")], rows_per_shard="auto", **options)
    assert plan.rows_per_shard == 7 and plan.shards["row_count"].to_pylist() == [7, 7, 7, 7, 3]
    assert plan.facts.notes == [
        "shards of 7 rows, so that there are at most some 5; how long one lasts was not known: `scan --dry-run` "
        "says it, --rows-per-shard sets it"
    ]
    given = plan_captions([str(tmp_path / "x.parquet")], rows_per_shard=7, **options)
    assert given.shards.equals(plan.shards) and given.facts.notes == []


@pytest.fixture
def config(tmp_path: Path, sd1: str) -> ScanConfig:
    pq.write_table(pa.table({"TEXT": some_captions(12)}), tmp_path / "captions.parquet")
    return ScanConfig((str(tmp_path / "captions.parquet"),), str(tmp_path / "run"), sd1, second_look=0)


@pytest.mark.parametrize("begun", ["auto", 1024, 5])
def test_a_run_goes_on_by_auto_and_by_its_number(config: ScanConfig, begun: int) -> None:
    """Also one that was begun with another number than auto would be: it is the run's."""
    assert scan(replace(config, rows_per_shard=begun)).complete
    number = 1024 if begun == "auto" else begun
    facts = json.loads(Path(config.output, "run.json").read_text())
    assert facts["fingerprint"]["rows_per_shard"] == facts["config"]["rows_per_shard"] == number
    before = tree(Path(config.output))
    words = ("scan", *config.captions, "-o", config.output, "--model", config.model, "--second-look", 0)
    for flags in ((), ("--rows-per-shard", "auto"), ("--rows-per-shard", number)):
        found = be_audit(*words, *flags)
        assert found.code == 0 and "nothing to do" in found.out, found
    found = be_audit(*words, "--rows-per-shard", 7)
    assert found.code == 2 and f"  rows_per_shard: {number} -> 7\n" in found.err
    assert tree(Path(config.output)) == before
    Path(config.output, "plan.arrow").unlink()
    assert verify_run(config.output, repair=True).whole
    assert Run.open(config.output).fingerprint.rows_per_shard == number


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "Auto"])
def test_what_is_no_number_of_rows_is_one_line(config: ScanConfig, value: str) -> None:
    found = be_audit("scan", *config.captions, "-o", config.output, "--model", config.model, "--rows-per-shard", value)
    assert found.code == 2
    assert found.err.splitlines()[-1] == (
        f"Error: Invalid value for '--rows-per-shard': {value} is neither a whole number of at least 1 nor auto"
    )
    assert not Path(config.output).exists()


@pytest.mark.parametrize("value", [0, -5, "many", None, 1.5])
def test_in_python_too(config: ScanConfig, value: int) -> None:
    with pytest.raises(AuditError, match=f"^--rows-per-shard {value}: "):
        scan(replace(config, rows_per_shard=value))
    assert not Path(config.output, "run.json").exists()


def test_a_dry_run_says_the_number(config: ScanConfig) -> None:
    found = be_audit("scan", *config.captions, "--model", config.model, "--dry-run")
    assert "shards           1 of 1,024 rows\n" in found.out, found
