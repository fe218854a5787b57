"""A report of a run whose input has no random access (it is staged) names the file and its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audit.reports.report import ReportConfig, report
from audit.scores.scan import ScanConfig, scan
from tests.tiny import save_model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, text", [("c.csv", "TEXT\na cat\na dog\n"), ("c.jsonl", '{"text": "a"}\n{"text": "b"}\n')]
)
def test_staged_inputs_are_reported(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    model = str(save_model("sd1", tmp_path / "model"))
    scan(ScanConfig(captions=(str(tmp_path / name),), model=model, output=str(tmp_path / "run"), steps=2, device="cpu"))
    report(ReportConfig(run=str(tmp_path / "run")))
    (facts,) = (tmp_path / "run/report").rglob("report.json")
    assert json.loads(facts.read_text())["captions"] == [{"file": str(tmp_path / name), "rows": 2}]
