"""What a scan says before it begins, and what it makes of captions that are all empty or very long."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from audit import testbed
from audit.base.ours import is_run_name
from audit.cli.commands import cli
from audit.run.stage import STAGES
from pipelines.loading import find_model, load
from pipelines.model import LONGEST


def scan(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["scan", *arguments, "--model", "testbed", "--device", "cpu", "--second-look", "0"])
    return done.exit_code, done.output


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    table = {"TEXT": pa.nulls(3, pa.string()), "caption": ["a sofa", "", "a sofa"], "url": ["a", "b", "c"]}
    pq.write_table(pa.table(table), folder / "x.parquet")
    (folder / "notes.md").write_text("x")
    return folder


PLAN = (
    "plan: 1 file, 3 rows, 1 different captions, 1 empty; captions from caption (TEXT has no text); carried: url\n"
    "left out: 1 of other kinds\n"
)


def test_the_plan_is_said_and_recorded(captions: Path, tmp_path: Path) -> None:
    code, output = scan(str(captions), "--dry-run", "-o", str(tmp_path / "run"))
    assert code == 0 and output.startswith(PLAN) and not (tmp_path / "run").exists()
    code, output = scan(str(captions), "-o", str(tmp_path / "run"))
    assert code == 0 and PLAN in output
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["captions"]
    assert facts["left_out"] == {"of other kinds": 1} and facts["caption_columns"] == {"caption": "TEXT has no text"}
    code, output = scan(str(captions), "-o", str(tmp_path / "run"))
    assert code == 0 and PLAN in output, "said again where it goes on"


def test_a_run_inside_the_folder_it_scans(captions: Path) -> None:
    """Its own tables are no captions, also when the command is given again."""
    for _ in range(2):
        code, output = scan(str(captions), "-o", str(captions / "run"))
        assert code == 0 and "3 rows, 1 unique captions" in output
    code, output = scan(str(captions), "-o", str(captions / "other"))
    assert code == 0 and "3 rows, 1 unique captions" in output and "of be-audit's own" in output


def test_the_folder_of_every_stage_is_a_runs_own() -> None:
    assert all(is_run_name(kind.files) for kind in STAGES.values())


def test_captions_inside_the_run_they_make(captions: Path) -> None:
    for _ in range(2):
        code, output = scan(str(captions), "-o", str(captions.parent))
        assert code == 0 and "3 rows, 1 unique captions" in output
    assert (captions.parent / "run.json").exists() and (captions / "x.parquet").exists()
    (captions.parent.parent / "letters").mkdir()
    (captions.parent.parent / "letters" / "mine.txt").write_text("x")
    code, output = scan(str(captions), "-o", str(captions.parent.parent / "letters"))
    assert code == 2 and "(it has mine.txt): give a new one, for example -o" in output


def test_captions_that_are_all_empty_are_no_quiet_success(tmp_path: Path) -> None:
    pq.write_table(pa.table({"TEXT": [None, ""], "caption": pa.array([" ", None])}), tmp_path / "x.parquet")
    code, output = scan(str(tmp_path / "x.parquet"), "-o", str(tmp_path / "run"))
    assert code == 3
    assert "2 rows, 0 different captions, 2 empty; captions from TEXT (none of TEXT, caption has text)" in output
    assert "0 scored, 0 duplicates, 2 empty" in output and "No caption has text" in output
    assert scan(str(tmp_path / "x.parquet"), "--dry-run")[0] == 3


def test_of_a_caption_without_end_the_beginning_is_tokenized() -> None:
    model = load(find_model(str(testbed.PIPELINE)), "cpu", "float32")
    text = "a photo of a sofa " * 300_000
    long, short, blanks, plain = (model.encode([each]) for each in (text, text[:LONGEST], " " * 200_000 + "x", "x"))
    assert bool(long.truncated) and int(long.num_tokens) == int(short.num_tokens) <= LONGEST
    assert (long.hidden == short.hidden).all()
    assert (blanks.hidden == plain.hidden).all() and not bool(blanks.truncated), "what lies behind blanks is not lost"
