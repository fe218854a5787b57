"""A detector is one function in one place: its column, its docs, its flags, its rows and its reports follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from tests.conftest import once

TOY = '''
"""be-audit with one more detector, registered as a line of pipelines/detectors.py would."""
from pipelines.detectors import FirstStep, detector


@detector("largest cell of the energy map", "a toy")
def peak(first: FirstStep):
    return first.energy.amax((-2, -1))


import json, sys

from audit.cli.commands import cli

for words in json.loads(sys.argv[1]):
    cli(words, standalone_mode=False)
'''


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    """Twelve captions of the testbed with labels, and the program."""
    return once(shared / "toy", _scanned)


def _scanned(folder: Path) -> Path:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[table.copy_error < 0.15].sort_values("copy_error", kind="stable").head(4)
    rows = [*copied.to_dict("records"), *table[table.cluster.str.startswith("unseen")].head(8).to_dict("records")]
    chosen = [{name: row[name] for name in ("TEXT", "label")} for row in rows]
    pq.write_table(pa.Table.from_pylist(chosen), folder / "captions.parquet")
    (folder / "toy.py").write_text(TOY)
    toy(folder, ("scan", "captions.parquet", "--model", "testbed", "--device", "cpu", "--refine", 0.01, "--steps", 2))
    return folder


def toy(folder: Path, *commands: Sequence[object]) -> str:
    """Run commands with the toy in them; what they print."""
    words = [sys.executable, "toy.py", json.dumps([[str(word) for word in command] for command in commands])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_its_column_is_in_the_run_with_its_description(folder: Path) -> None:
    table = pa.ipc.open_file(str(folder / "be-audit-run/scores/000/00000.arrow")).read_all()
    field = table.schema.field("peak")
    assert field.metadata[b"description"] == b"largest cell of the energy map (a toy)"
    peaks, magnitudes = table["peak"].to_numpy(), table["magnitude"].to_numpy()
    assert table["peak"].null_count == 0 and (peaks > 0).all() and (peaks < magnitudes**2).all()
    refined = next((folder / "be-audit-run/refined").rglob("*.arrow"))
    again = pa.ipc.open_file(str(refined)).read_all().to_pylist()[0]
    assert again["peak"] == pytest.approx(peaks[again["row_id"]], rel=1e-4)


@pytest.mark.processes
def test_flags_documents_and_readers_know_it(folder: Path) -> None:
    code = TOY.split("import json")[0] + "from audit.reports.dictionary import data_dictionary as text; print(text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "| `peak` | float | largest cell of the energy map (a toy) |" in done.stdout
    commands = ("scan", "confirm", "report", "calibrate")
    told = toy(folder, *((command, "--help") for command in commands)).replace("\n", "").replace(" ", "")
    assert all("peak" in part for part in told.split("Usage:")[1:]) and told.count("Usage:") == len(commands)
    ranked = json.loads(toy(folder, ("sql", _query(folder), "--format", "json")))
    assert ranked[0]["peak"] >= ranked[1]["peak"] > 0
    evaluate = ("evaluate", "--labels", "captions.parquet", "--label-col", "label", "--resamples", 100)
    printed = toy(folder, ("report", "--by", "peak"), evaluate)
    exported = pq.read_table(folder / "be-audit-run/report/exports/flagged.parquet")
    assert exported["score"].equals(exported["peak"]) and exported["score_name"][0].as_py() == "peak"
    assert '"peak"' in (folder / "be-audit-run/report/data.js").read_text()
    assert any(line.split()[:2] == ["scan", "peak"] for line in printed.splitlines())


def _query(folder: Path) -> Path:
    path = folder / "peaks.sql"
    path.write_text("SELECT caption, peak FROM scores ORDER BY peak DESC")
    return path


def test_a_score_without_a_column_is_an_error_and_no_silent_drop() -> None:
    from audit.run.schema import table_of

    with pytest.raises(KeyError, match="no column for novel"):
        table_of([{"row_id": 1, "novel": 2.0}], {"row_id": (pa.int64(), "row")})
