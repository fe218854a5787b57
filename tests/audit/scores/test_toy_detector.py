"""A detector is one function in one place: its column, its docs, its flags, its rows and its reports follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed

TOY = '''
"""be-audit with one more detector, registered as a line of pipelines/detectors.py would."""
import sys

from pipelines.detectors import FirstStep, detector


@detector("largest cell of the energy map", "a toy")
def peak(first: FirstStep):
    return first.energy.amax((-2, -1))


from audit.cli.__main__ import main

main()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captions of the testbed with labels, and the program."""
    folder = tmp_path_factory.mktemp("toy")
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[table.copy_error < 0.15].sort_values("copy_error", kind="stable").head(4)
    rows = [*copied.to_dict("records"), *table[table.cluster.str.startswith("unseen")].head(8).to_dict("records")]
    chosen = [{name: row[name] for name in ("TEXT", "label")} for row in rows]
    pq.write_table(pa.Table.from_pylist(chosen), folder / "captions.parquet")
    (folder / "toy.py").write_text(TOY)
    toy(folder, "scan", "captions.parquet", "--model", "testbed", "--device", "cpu", "--refine", 0.01, "--steps", 2)
    return folder


def toy(folder: Path, *arguments: object) -> str:
    """Run the command with the toy in it; what it prints."""
    words = [sys.executable, "toy.py", *map(str, arguments)]
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
    code = (
        TOY.split("from audit.cli")[0] + "from audit.reports.dictionary import data_dictionary as text; print(text())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "| `peak` | float | largest cell of the energy map (a toy) |" in done.stdout
    for command in (("scan",), ("confirm",), ("report",), ("calibrate",)):
        assert "peak" in toy(folder, *command, "--help").replace("\n", "").replace(" ", "")
    ranked = json.loads(toy(folder, "sql", _query(folder), "--format", "json"))
    assert ranked[0]["peak"] >= ranked[1]["peak"] > 0
    toy(folder, "report", "--by", "peak")
    exported = pq.read_table(folder / "be-audit-run/report/exports/flagged.parquet")
    assert exported["score"].equals(exported["peak"]) and exported["score_name"][0].as_py() == "peak"
    assert '"peak"' in (folder / "be-audit-run/report/data.js").read_text()
    printed = toy(folder, "evaluate", "--labels", "captions.parquet", "--label-col", "label", "--resamples", 100)
    assert any(line.split()[:2] == ["scan", "peak"] for line in printed.splitlines())


def _query(folder: Path) -> Path:
    path = folder / "peaks.sql"
    path.write_text("SELECT caption, peak FROM scores ORDER BY peak DESC")
    return path


def test_a_score_without_a_column_is_an_error_and_no_silent_drop() -> None:
    from audit.run.schema import table_of

    with pytest.raises(KeyError, match="no column for novel"):
        table_of([{"row_id": 1, "novel": 2.0}], {"row_id": (pa.int64(), "row")})
