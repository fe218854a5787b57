"""Text files that are legal and perhaps not meant so: captions under several names, rows that a quote swallowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.audit.captions.test_captions_found import plan_of, quoting, read

MIXED = [{"caption": "a"}, {"Caption": "b"}, {"caption": " ", "text": "c"}, {"id": 4}, {"captions": ["d"], "text": ""}]
LINE = "3 rows read as empty, but with text in another column, Caption (1), text (1), captions (1), the first {}: "


@pytest.mark.parametrize(
    ("name", "place"), [("x.jsonl", "x.jsonl, line 2"), ("x.json", "x.json, item 2"), ("y.json", "y.json, record 'k1'")]
)
def test_captions_under_another_name_are_said(tmp_path: Path, name: str, place: str) -> None:
    records = {f"k{row}": record for row, record in enumerate(MIXED)}
    forms = {"x.jsonl": "\n".join(map(json.dumps, MIXED)), "x.json": json.dumps(MIXED), "y.json": json.dumps(records)}
    (tmp_path / name).write_text(forms[name])
    plan = plan_of(tmp_path / name, tmp_path / "run", keep_cols=())
    assert (plan.num_rows, plan.num_empty) == (5, 4)
    assert [note for note in plan.facts.notes if note.startswith(LINE.format(tmp_path / place))] == plan.facts.notes
    assert plan.facts.lines(5, 1, 4)[-1].startswith("note: 3 rows read as empty")


def test_only_rows_that_are_read_count(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, MIXED)))
    assert plan_of(tmp_path / "x.jsonl", tmp_path / "run", limit=1).facts.notes == []
    assert plan_of(tmp_path / "x.jsonl", tmp_path / "run", limit=2).facts.notes[0].startswith("1 row read as empty")


def test_captions_in_another_column_of_a_csv_are_said(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("TEXT,caption,alt\na sofa,,\n,,a lamp\n,a bed,\n")
    line = f"1 row read as empty, but with text in another column, caption (1), the first {tmp_path}/x.csv, line 4: "
    notes = plan_of(tmp_path / "x.csv", tmp_path / "run").facts.notes
    assert len(notes) == 1 and notes[0].startswith(line)
    assert plan_of(tmp_path / "x.csv", tmp_path / "run", caption_col="caption").facts.notes[0].startswith("1 row read")


def test_captions_of_one_name_are_no_remark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"caption": "a", "text": "b"}\n{"caption": null, "alt": "c"}\n')
    assert plan_of(tmp_path / "x.jsonl", tmp_path / "run").facts.notes == []


SWALLOWED = 'url,caption\nu0,a lamp\nu1,"A cat\nu2,a dog 12"\n\nu3,"two\nlines"\n'


def test_quoted_fields_over_lines_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(SWALLOWED)
    (tmp_path / "y.csv").write_text('url,caption\n"u\n4","three\n\nlines"\n')
    plan = plan_of([str(tmp_path / "x.csv"), str(tmp_path / "y.csv")], tmp_path / "run")
    assert plan.num_rows == 4
    assert plan.facts.notes == [
        f"4 quoted fields over several lines, the first {tmp_path}/x.csv, lines 3 to 4: where a quote that is a letter "
        "swallowed rows, pass --quoting none; --quoting csv where they are meant"
    ]
    alone = plan_of(tmp_path / "y.csv", tmp_path / "run").facts.notes
    assert alone[0].startswith(f"2 quoted fields over several lines, the first {tmp_path}/y.csv, lines 2 to 5: ")


def test_both_ways_out_of_a_quoted_field_over_lines_work(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(SWALLOWED)
    meant = plan_of(tmp_path / "x.csv", tmp_path / "run", text_format=quoting("csv"))
    assert (meant.num_rows, meant.facts.notes) == (3, [])
    (tmp_path / "y.csv").write_text('url,caption\nu1,"A cat\nu2,a dog 12"\n')
    rows = read(tmp_path / "y.csv", tmp_path, text_format=quoting("none"))
    assert [row["caption"] for row in rows] == ['"A cat', 'a dog 12"']


def test_blank_lines_are_no_field_over_lines(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('url,caption\n\nu0,"a lamp"\n\n\nu1,a bed\n')
    assert plan_of(tmp_path / "x.csv", tmp_path / "run").facts.notes == []
