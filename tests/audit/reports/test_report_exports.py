"""The exported tables: one schema in three formats, safe in a spreadsheet, open to the usual tools; the deny list."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.text import plain_text
from audit.reports.dictionary import data_dictionary
from audit.reports.export import table_as
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


def test_decimals_are_numbers_in_every_format() -> None:
    held = [Decimal("-1.50"), Decimal("2.00"), Decimal("0.00"), None]
    table = pa.table({"d": pa.array(held, pa.decimal128(20, 2)), "x": [1, 2, 3, 4]})
    assert table_as(table, "csv").decode().split("\r\n") == ["d,x", "-1.50,1", "2.00,2", "0.00,3", ",4", ""]
    lines = [json.loads(line) for line in table_as(table, "jsonl").decode().splitlines()]
    assert [row["d"] for row in lines] == [-1.5, 2, 0, None] and isinstance(lines[1]["d"], int)
    tiny = pa.table({"d": pa.array([Decimal("-0.00000001")], pa.decimal128(20, 8))})
    assert table_as(tiny, "csv") == b"d\r\n-0.00000001\r\n"
    huge = pa.table({"d": pa.array([Decimal(10**37 + 1)], pa.decimal128(38, 0))})
    assert table_as(huge, "jsonl").decode() == f'{{"d": {10**37 + 1}}}\n'
    nested = pa.table({"d": pa.array([[Decimal("-1.50")]], pa.list_(pa.decimal128(20, 2)))})
    assert table_as(nested, "jsonl") == b'{"d": [-1.5]}\n' and table_as(nested, "csv") == b"d\r\n[-1.5]\r\n"


def test_what_json_has_no_number_for_is_null_at_any_depth() -> None:
    bad = [float("nan"), float("inf"), -float("inf"), 1.5]
    table = pa.table(
        {
            "top": bad[:1],
            "list": [bad],
            "deep": [[{"a": bad}]],
            "map": pa.array([[("k", bad[1])]], pa.map_(pa.string(), pa.float64())),
        }
    )

    def refused(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(table_as(table, "jsonl"), parse_constant=refused)
    safe = [None, None, None, 1.5]
    assert row == {"top": None, "list": safe, "deep": [{"a": safe}], "map": [["k", None]]}
    (cells,) = csv.DictReader(table_as(table, "csv").decode().splitlines())
    assert cells["top"] == "" and json.loads(cells["deep"], parse_constant=refused) == [{"a": safe}]


def far(kind: pa.DataType, value: int) -> pa.Array:
    """A date or time further than Python's, and one that it holds."""
    storage = pa.int32() if kind == pa.date32() else pa.int64()
    return pa.array([value, 0, None], storage).view(kind)


@pytest.mark.parametrize(
    ("kind", "value", "text", "near"),
    [
        (pa.timestamp("us"), 2**60, "38504-08-17 21:30:06.846976", "1970-01-01 00:00:00"),
        (pa.timestamp("us", "UTC"), 2**60, "38504-08-17 21:30:06.846976+00:00", "1970-01-01 00:00:00+00:00"),
        (pa.timestamp("s"), 2**62, "146138514283-06-19 07:45:04", "1970-01-01 00:00:00"),
        (pa.date32(), 2**30, "2941775-04-07", "1970-01-01"),
        (pa.duration("s"), 2**62, "4611686018427387904 seconds", "0:00:00"),
    ],
    ids=str,
)
def test_dates_beyond_python_are_text(kind: pa.DataType, value: int, text: str, near: str) -> None:
    dates = far(kind, value)
    nested = pa.ListArray.from_arrays([0, 3, 3, 3], dates)
    keys = pa.array(["a", "b", "c"])
    table = pa.table(
        {
            "d": dates,
            "list": nested,
            "struct": pa.StructArray.from_arrays([dates, keys], ["when", "key"]),
            "map": pa.MapArray.from_arrays([0, 1, 2, 3], keys, dates),
            "of": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), dates),
        }
    )
    rows = [json.loads(line) for line in table_as(table, "jsonl").decode().splitlines()]
    assert [row["d"] for row in rows] == [row["of"] for row in rows] == [text, near, None]
    assert [row["list"] for row in rows] == [[text, near, None], [], []]
    assert [row["struct"] for row in rows] == [
        {"when": text, "key": "a"},
        {"when": near, "key": "b"},
        {"when": None, "key": "c"},
    ]
    assert [row["map"] for row in rows] == [[["a", text]], [["b", near]], [["c", None]]]
    cells = list(csv.DictReader(table_as(table, "csv").decode().splitlines()))
    assert [row["d"] for row in cells] == [text, near, ""]
    stored = pq.read_table(pa.BufferReader(table_as(table.select(["d"]), "parquet")))["d"]
    held = pa.types.is_temporal(stored.type) or pa.types.is_integer(stored.type)
    assert stored.null_count == 1 and (held or stored.to_pylist() == [text, near, None])


def test_what_parquet_cannot_hold_is_text_there() -> None:
    spans = pa.array([pa.MonthDayNano([1, 2, 3]), None])
    described = pa.field("s", spans.type, metadata={"description": "how long"})
    table = pa.table([pa.array([1, 2]), spans], schema=pa.schema([pa.field("n", pa.int64()), described]))
    stored = pq.read_table(pa.BufferReader(table_as(table, "parquet")))
    assert stored["n"].to_pylist() == [1, 2] and stored["s"].type == pa.string()
    assert stored["s"].to_pylist() == ["MonthDayNano(months=1, days=2, nanoseconds=3)", None]
    assert stored.schema.field("s").metadata[b"description"] == b"how long"


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
