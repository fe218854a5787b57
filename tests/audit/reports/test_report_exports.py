"""The exported tables: one schema in three formats, safe in a spreadsheet, open to the usual tools; the deny list."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.reports.dictionary import data_dictionary
from audit.reports.export import plain_text, table_as
from audit.reports.report import ReportConfig, report
from tests.fabricate import HOSTILE, add_confirm, make_run


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a run with hostile captions, repeated ones and verdicts."""
    folder = tmp_path_factory.mktemp("exports")
    captions = [*HOSTILE, "twice", "once", "twice", HOSTILE[0]]
    run = make_run(
        folder, captions, scores=[float(len(captions) - at) for at in range(len(captions))], rows_per_shard=4
    )
    add_confirm(run, ["global", "none", "local", "no_reference"])
    report(ReportConfig(run=run.url, format=("parquet", "jsonl", "csv"), top_k=50))
    return folder / "RUN" / "report" / "exports"


def test_parquet_and_jsonl_hold_the_same_rows_unchanged(exports: Path) -> None:
    table = pq.read_table(exports / "flagged.parquet")
    lines = [json.loads(line) for line in (exports / "flagged.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert lines == table.to_pylist()
    assert set(HOSTILE) <= set(table["caption"].to_pylist())


def test_csv_differs_from_parquet_by_apostrophes_alone(exports: Path) -> None:
    table = pq.read_table(exports / "flagged.parquet").to_pylist()
    with (exports / "flagged.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"].removeprefix("'") for row in rows] == [row["caption"] for row in table]
    assert [float(row["score"]) for row in rows] == [row["score"] for row in table]
    assert [row["verdict"] for row in rows] == [row["verdict"] or "" for row in table]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "  =1", "＝1", "'=1", "\n1"])
def test_no_cell_can_start_a_formula(text: str) -> None:
    made = plain_text(text)
    assert made == "'" + text
    assert table_as(pa.table({"c": [text]}), "csv").decode().split("\r\n", 1)[1].lstrip('"').startswith("'")


@pytest.mark.parametrize("text", ["a=b", "it's", "'tis", "1-2", "https://x.example/?a=b", ""])
def test_harmless_cells_are_left_alone(text: str) -> None:
    assert plain_text(text) == text


def test_numbers_keep_their_sign_in_csv() -> None:
    assert table_as(pa.table({"n": [-1.5, None]}), "csv") == b'n\r\n-1.5\r\n""\r\n'


def test_order_is_stable_and_documented(exports: Path) -> None:
    table = pq.read_table(exports / "flagged.parquet").to_pandas()
    order = table["verdict"].map({"global": 0, "local": 1, "none": 2, "no_reference": 3}).fillna(4)
    again = table.assign(order=order).sort_values(["order", "score", "row_id"], ascending=[True, False, True])
    assert again.index.tolist() == list(range(len(table)))


def test_pandas_duckdb_and_datasets_open_them(exports: Path) -> None:
    import datasets

    count = pq.read_metadata(exports / "flagged.parquet").num_rows
    for name in ("parquet", "jsonl", "csv"):
        file = str(exports / f"flagged.{name}")
        reader = {"parquet": "read_parquet", "jsonl": "read_json", "csv": "read_csv"}[name]
        options = ", all_varchar=true, header=true" if name == "csv" else ""
        found = duckdb.sql(f"SELECT count(*) FROM {reader}('{file}'{options})").fetchall()
        assert found == [(count,)], name
    assert len(pd.read_parquet(exports / "flagged.parquet")) == count
    assert len(pd.read_json(exports / "flagged.jsonl", lines=True)) == count
    assert len(pd.read_csv(exports / "flagged.csv")) == count
    loaded = datasets.load_dataset(str(exports), "flagged", split="train", cache_dir=str(exports.parent / "cache"))
    assert loaded.num_rows == count and "ld_energy" in loaded.column_names
    denied = datasets.load_dataset(str(exports), "denylist", split="train", cache_dir=str(exports.parent / "cache"))
    assert denied.num_rows == pq.read_metadata(exports / "denylist.parquet").num_rows


def test_every_column_says_what_it_is_in_the_file_and_on_the_card(exports: Path) -> None:
    card = (exports / "README.md").read_text()
    for name in ("flagged", "denylist"):
        for field in pq.read_schema(exports / f"{name}.parquet"):
            text = field.metadata[b"description"].decode()
            assert len(text) > 5
            assert f"| `{field.name}` |" in card


def test_the_deny_list_names_every_row_of_a_reproduced_caption_and_the_pictures(exports: Path) -> None:
    rows = pq.read_table(exports / "denylist.parquet").to_pylist()
    captions = [
        (row["caption"], row["verdict"], row["input_row"], row["key"]) for row in rows if row["source"] == "caption"
    ]
    last = len(HOSTILE) + 3
    assert captions == [
        (HOSTILE[0], "global", 0, "k0000000"),
        (HOSTILE[2], "local", 2, "k0000002"),
        (HOSTILE[0], "global", last, f"k{last:07d}"),
    ]
    pictures = [(row["key"], row["verdict"], row["row_id"]) for row in rows if row["source"] == "picture"]
    assert pictures == [("pic0", "global", 0), ("pic2", "local", 2)]


def test_without_verdicts_the_deny_list_holds_what_is_flagged(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["ant", "bee", "cat", "bee"], scores=[1, 3, 2, 3])
    report(ReportConfig(run=run.url, format=("csv",), threshold=2.5))
    with (tmp_path / "RUN/report/exports/denylist.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["caption"], row["row_id"], row["verdict"]) for row in rows] == [("bee", "1", ""), ("bee", "3", "")]


def test_a_run_without_urls_or_keys_still_names_its_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["ant", "bee"], scores=[2, 1], keep=())
    report(ReportConfig(run=run.url, format=("jsonl",), top_k=1))
    (row,) = [json.loads(line) for line in (tmp_path / "RUN/report/exports/denylist.jsonl").read_text().splitlines()]
    assert (row["url"], row["key"], row["input_row"]) == (None, None, 0)
    assert row["input_file"].endswith("captions.csv")


def test_the_data_dictionary_in_docs_is_the_schema() -> None:
    docs = Path(__file__).parents[3] / "docs" / "data-dictionary.md"
    assert "| null |" not in docs.read_text()  # a column whose type the run tells has it in words
    assert docs.read_text() == data_dictionary(), "python -m audit.reports.dictionary > docs/data-dictionary.md"
