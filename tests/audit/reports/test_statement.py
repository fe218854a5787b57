"""statement.md and summary.json: what people sign is what the run holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audit.reports.flagged import find_flagged
from audit.reports.report import ReportConfig, report
from audit.run.run import Run
from audit.statistics.intervals import share_interval
from audit.statistics.null import CAPTIONS, Null
from tests.command import be_audit
from tests.fabricate import add_confirm, make_run

NAMES = [f"caption {word}" for word in ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")]


def stated(run: Run) -> tuple[dict, str]:
    done = report(ReportConfig(run=run.url, format=("jsonl",)))
    assert {name.rsplit("/", 1)[1] for name in done.files} >= {"statement.md", "summary.json"}
    folder = Path(run.url) / "report"
    return json.loads((folder / "summary.json").read_text()), (folder / "statement.md").read_text()


def test_every_number_comes_from_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, [*NAMES, NAMES[0]], scores=[*range(10, 0, -1), 10], failed=[9])
    add_confirm(run, ["global", "local", "local", "none", "no_reference"], num_images=2)
    found, text = stated(run)
    assert found["result"]["reproduced"] == 3 and found["result"]["decided"] == 4
    assert (found["result"]["global"], found["result"]["local"], found["result"]["none"]) == (1, 2, 1)
    assert (found["result"]["share_low"], found["result"]["share_high"]) == share_interval(3, 4)
    assert found["model"]["sha256"] == "0" * 64 and found["run"]["fingerprint"] == run.digest
    assert found["captions"]["distinct"] == 9 and found["captions"]["error"] == 1
    # p of the candidates: 1/401, 2/401 twice, 0.5; m = 4: q of the local ones 4 (2/401) / 3, of three candidates
    assert found["error_rates"]["expected_false_local"] == pytest.approx(3 * 4 * 2 / 401 / 3, rel=1e-5)
    assert found["error_rates"]["local"]["promised_a_candidate"] == 0.01
    assert found["error_rates"]["global"] is None  # different training pictures say nothing of it
    for line in (
        "**3 reproduce a training picture**: 1 as a whole (SSCD above 0.5), 2 in a region",
        "4 could be decided",
        "1 captions could not be scored",
        "4 scored captions were no candidates",
        "1 candidates could be compared with no training picture",
        "The index is not at hand any more",
        f"`{run.digest}`",
        "| 1.00% promised |",
    ):
        assert line in text
    assert str(tmp_path) not in text  # folders of the machine are nobody's business


def test_a_null_of_clean_captions_tells_the_rate_of_global_verdicts_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, NAMES)
    add_confirm(run, ["global", "none"], null=Null.of(CAPTIONS, np.linspace(0.3, 0.9, 200), 0.05, copies=3))
    found, text = stated(run)
    low, high = share_interval(3, 200)
    assert found["error_rates"]["global"] == {"clean_captions": 200, "global_copies": 3, "low": low, "high": high}
    assert "| clean captions with a global verdict | 3 of 200 (1.50%) | 0.31% to 4.32% |" in text


def test_without_a_confirm_nothing_is_said_to_be_reproduced(tmp_path: Path) -> None:
    found, text = stated(make_run(tmp_path, NAMES))
    assert found["result"] is None and found["error_rates"] is None
    assert "no caption is said to be reproduced" in text and "10 scored captions: no image of them" in text


def test_q_values_are_the_same_in_report_and_sql(tmp_path: Path) -> None:
    run = make_run(tmp_path, NAMES)
    add_confirm(run, ["global", "local", "none", "local", "no_reference", "none"])
    table = find_flagged(run, "ld_energy", None, 0).table
    ours = dict(zip(table["row_id"].to_pylist(), table["q_value"].to_pylist(), strict=True))
    query = tmp_path / "q.sql"
    query.write_text("SELECT row_id, q_value FROM confirmed")
    done = be_audit("sql", query, run.url, "--format", "json")
    assert done.code == 0, done.err
    theirs = {row["row_id"]: row["q_value"] for row in json.loads(done.out)}
    assert theirs.keys() == ours.keys()
    for row_id, q in ours.items():
        assert theirs[row_id] == (None if q is None else pytest.approx(q, rel=1e-6))
