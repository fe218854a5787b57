"""More of each kind of table, document and folder: read as what it is, or refused with a way out that works."""

from __future__ import annotations

import bz2
import json
import lzma
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError
from audit.captions import TextFormat
from tests.audit.captions.test_captions_found import plan_of, read, rows_of

datasets.disable_progress_bars()


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def ipc(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return path


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string(), 2),
        pa.list_(pa.string_view()),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.large_string()),
        pa.list_(pa.binary()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_lists_of_every_layout(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.array([["no", "row"], ["one", "two"], None, ["three", None]], kind).slice(1)
    ipc(tmp_path / "x.arrow", captions=lists, key=[7, 8, 9])
    rows = read(tmp_path / "x.arrow", tmp_path, caption_col="captions")
    expected = [("one", 7), ("two", 7), (None, 8), ("three", 9), (None, 9)]
    assert [(row["caption"], row["key"]) for row in rows] == expected


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_text_that_its_writer_called_binary(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([b"a sofa", None, "été".encode(), b"caf\xe9"]).cast(kind)
    rows = read(ipc(tmp_path / "x.arrow", caption=values), tmp_path)
    assert [row["caption"] for row in rows] == ["a sofa", None, "été", "caf\ufffd"]


def categories(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A dictionary of its own, backwards, for each part of a table."""
    places = [None if value is None else len(values) - 1 - at for at, value in enumerate(values)]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int8()), pa.array(values[::-1], kind))


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", KINDS)
def test_an_arrow_stream_whose_dictionary_changes(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [["a sofa", None, "a bed"], ["a lamp", "a sofa", "a chair"]]
    with_bytes = pa.types.is_binary(kind) or pa.types.is_binary_view(kind)
    parts = []
    for part in texts:
        values = [text.encode() if text is not None and with_bytes else text for text in part]
        url = categories([f"u {text}" for text in part], pa.string())
        ids = categories([1e12, None, 3.0], pa.float64())
        parts.append(pa.table({"caption": categories(values, kind), "url": url, "id": ids}))
    with pa.ipc.new_stream(tmp_path / "x.arrow", parts[0].schema) as writer:
        for table in parts:
            writer.write_table(table)
    ids = ["1000000000000", None, "3"]
    expected = [{"caption": t, "url": f"u {t}", "id": id} for part in texts for t, id in zip(part, ids, strict=True)]
    assert read(tmp_path / "x.arrow", tmp_path) == expected
    with pa.ipc.new_file(tmp_path / "file.arrow", parts[0].schema) as writer:  # which is read in place
        writer.write_table(parts[0])
    assert read(tmp_path / "file.arrow", tmp_path) == expected[:3]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_categories_and_lists_of_captions_over_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    kinds = {"captions": pa.list_(kind), "key": pa.dictionary(pa.int8(), pa.string())}
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema(kinds)) as writer:
        for group in ("ab", "cd"):
            lists = pa.array([[f"one {key}", f"two {key}"] for key in group], kinds["captions"])
            writer.write_table(pa.table({"captions": lists, "key": categories(list(group), pa.string())}))
    rows = read(tmp_path / "x.parquet", tmp_path, caption_col="captions")
    assert [tuple(row.values()) for row in rows] == [(f"{n} {key}", key) for key in "abcd" for n in ("one", "two")]


def test_long_categories_are_written_out_a_few_at_a_time(tmp_path: Path) -> None:
    """A few bytes may stand for gigabytes: 8 texts of 5 MB in 100 rows."""
    texts = pa.array([str(number) * 5_000_000 for number in range(8)])
    column = pa.DictionaryArray.from_arrays(pa.array([row % 8 for row in range(100)], pa.int8()), texts)
    with pa.ipc.new_stream(tmp_path / "x.arrow", pa.schema({"caption": column.type})) as writer:
        writer.write_table(pa.table({"caption": column}))
    plan = plan_of(tmp_path / "x.arrow", tmp_path / "run")
    assert (plan.num_rows, plan.num_unique) == (100, 8)
    staged = pa.ipc.open_file(tmp_path / "run" / "input" / "00000.arrow")
    assert max(staged.get_batch(at).nbytes for at in range(staged.num_record_batches)) < 40 << 20


@pytest.mark.parametrize("blank", [pa.nulls(2), pa.array(["", None])])
def test_of_a_blank_column_and_one_of_lists_the_lists_are_named(tmp_path: Path, blank: pa.Array) -> None:
    path = parquet(tmp_path / "x.parquet", TEXT=blank, captions=[["a"], ["b"]])
    with pytest.raises(AuditError, match="pass --caption-col captions for a row a caption"):
        plan_of(path, tmp_path / "run")
    assert len(read(path, tmp_path, caption_col="captions")) == 2


def test_ids_of_databases_and_floats_are_text(tmp_path: Path) -> None:
    """One key however it is written: 1e12 as a float of LAION, as JSON of pandas, as a decimal of a database."""
    parquet(tmp_path / "0.parquet", caption=["a", "b"], SAMPLE_ID=[1e12, float("nan")])
    assert [row["SAMPLE_ID"] for row in read(tmp_path / "0.parquet", tmp_path)] == ["1000000000000", None]
    decimals = pa.array([Decimal(10**12), Decimal(10**30)], pa.decimal128(38, 0))
    parquet(tmp_path / "1.parquet", caption=["a", "b"], SAMPLE_ID=decimals)
    (tmp_path / "2.jsonl").write_text(
        '{"caption": "a", "SAMPLE_ID": 1000000000000.0}\n{"caption": "b", "SAMPLE_ID": NaN}'
    )
    rows = read([str(tmp_path / name) for name in ("0.parquet", "1.parquet", "2.jsonl")], tmp_path)
    one = "1000000000000"
    assert [row["SAMPLE_ID"] for row in rows] == [one, None, one, str(10**30), one, None]


def test_what_nobody_asked_to_carry_never_stops_a_run(tmp_path: Path) -> None:
    first = {"caption": ["a"], "id": [1], "url": ["u"], "URL": ["v"], "row_id": [1], "hash": [b"\xff"]}
    parquet(tmp_path / "0.parquet", **first)
    parquet(tmp_path / "1.parquet", caption=["b"], id=[[1]])
    inputs = [str(tmp_path / name) for name in ("0.parquet", "1.parquet")]
    plan = plan_of(inputs, tmp_path / "run", reserved=["row_id"])
    assert rows_of(plan, tmp_path / "run") == [{"caption": "a", "url": "u"}, {"caption": "b", "url": None}]
    assert plan.facts.notes == [
        "URL is not carried: it differs from url in case alone, and SQL knows one",
        "row_id is not carried: a run has a column of that name itself",
        f"id is not carried: it is list<element: int64> in {inputs[1]}",
        f"hash is not carried: it is binary in {inputs[0]}",
    ]
    for name in ("id", "hash"):  # one that was asked for does
        with pytest.raises(AuditError, match="name other --keep-cols"):
            plan_of(inputs, tmp_path / "run", keep_cols=(name,))


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_the_flag_that_a_message_names_reads_lists_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"caption": ["one", "two"], "id": 1}\n{"caption": "three", "id": 2}\n')
    with pytest.raises(AuditError, match="pass --caption-col caption for a row a caption"):
        plan_of(tmp_path / "x.jsonl", tmp_path / "run")
    rows = read(tmp_path / "x.jsonl", tmp_path, caption_col="caption")
    assert [tuple(row.values()) for row in rows] == [("one", "1"), ("two", "1"), ("three", "2")]
    (tmp_path / "y.jsonl").write_text('{"captions": ["one"]}\n{"captions": ["two", 3]}\n')
    with pytest.raises(AuditError, match="line 2: 'captions' is a list, and not of texts"):
        plan_of(tmp_path / "y.jsonl", tmp_path / "run", caption_col="captions")


COCO = {"info": {"year": 2014}, "images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a sofa"}]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (COCO, """its records lie in an array: jq -c '.["images"][]', or another of its arrays"""),
        ({"x.jpg": "a sofa", "y.jpg": "a bed"}, "jq -c 'to_entries[]' and --caption-col value"),
        ({"x.jpg": ["a sofa", "a couch"], "y.jpg": []}, "jq -c 'to_entries[]' and --caption-col value"),
        (["a sofa", "a bed"], "jq -c '.[] | {caption: .}'"),
    ],
)
def test_documents_of_other_forms_are_told_apart(
    tmp_path: Path, content: Any, way_out: str, indent: int | None
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content, indent=indent))
    with pytest.raises(AuditError) as error:
        plan_of(tmp_path / "x.json", tmp_path / "run")
    assert way_out in str(error.value)


def test_a_first_line_of_objects_is_a_record_where_others_follow(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"exif": {"a": 1}}\n\n{"exif": {}, "caption": "a sofa"}\n')
    assert [row["caption"] for row in read(tmp_path / "x.jsonl", tmp_path)] == [None, "a sofa"]


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", "[]"), ("x.json", " [\n]\n"), ("x.jsonl", "\n"), ("x.csv", "\n")]
)
def test_a_text_part_without_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AuditError, match="no rows"):
        plan_of(tmp_path / name, tmp_path / "run")
    parquet(tmp_path / "a.parquet", caption=["a sofa"])
    assert len(read([str(tmp_path / "a.parquet"), str(tmp_path / name)], tmp_path)) == 1


# --- text files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_streams_one_behind_the_other(tmp_path: Path, packing: str, pack: Any) -> None:
    path = tmp_path / f"x.csv.{packing}"
    parts = [pack(b"caption\n" + b"a sofa\n" * 30_000), pack(b"a bed\n")]
    path.write_bytes(b"".join(parts) + b"\0" * 8)
    assert plan_of(path, tmp_path / "run").num_rows == 30_001
    path.write_bytes(parts[0] + b"\xff" + parts[1][1:])  # a damaged head is not the end
    with pytest.raises(AuditError, match="cut short or damaged"):
        plan_of(path, tmp_path / "run")


def test_a_carriage_return_that_is_a_letter(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"http://a/1\ta\rsofa\r\nhttp://a/2\ta bed\n")
    rows = read(tmp_path / "x.tsv", tmp_path, text_format=TextFormat.of(None, True, None))
    assert [row["caption"] for row in rows] == ["a\rsofa", "a bed"]
    (tmp_path / "x.csv").write_bytes(b"id,caption\r1,a sofa\r")
    with pytest.raises(AuditError, match=r"a carriage return outside quotes: where it ends lines, tr"):
        plan_of(tmp_path / "x.csv", tmp_path / "run")


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\3\4", "an Excel file"),
        (b"\x1f\x8b", "with .gz"),
        (b"PAR1", "with .parquet"),
        (b"<!DOCTYPE html>", "a web"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, head: bytes, what: str) -> None:
    (tmp_path / "x.csv").write_bytes(head + b"\0" * 100)
    with pytest.raises(AuditError, match=f"x.csv: no text, but .*{what}"):
        plan_of(tmp_path / "x.csv", tmp_path / "run")


def test_a_short_first_row_is_told_from_a_header(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("17,a sofa\n18,a bed\n")
    with pytest.raises(AuditError, match="where its first line is a row: --no-header"):
        plan_of(tmp_path / "x.csv", tmp_path / "run")


# --- folders ------------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_counted(tmp_path: Path) -> None:
    data = tmp_path / "in"
    parquet(data / "a.parquet", caption=["a sofa"])
    parquet(data / "sub" / "b.feather.parquet", caption=["a bed"])
    (data / "gone.parquet").symlink_to(data / "nothing.parquet")
    os.mkfifo(data / "pipe.parquet")
    odd = {"broken links": 1, "pipes and devices": 1}
    for given, rows, left in (
        (data, 2, odd),
        (data / "**" / "*.parquet", 2, odd),
        (data / "*", 1, {**odd, "folders, read where named or by **": 1}),
    ):
        plan = plan_of(given, tmp_path / "run")
        assert (plan.num_rows, plan.facts.left_out) == (rows, left), given


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "in" / "a.parquet", caption=["a sofa"])
    parquet(tmp_path / "in" / "shut" / "b.parquet", caption=["a bed"])
    scandir = os.scandir

    def refused(path: str) -> Any:  # as root, no folder is shut
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(AuditError, match="shut: cannot be listed: Permission denied"):
        plan_of(tmp_path / "in", tmp_path / "run")


def test_a_saved_data_set_is_told_by_its_content(tmp_path: Path) -> None:
    data = tmp_path / "in"
    parquet(data / "a.parquet", text=["a sofa"])
    for name in ("state.json", "dataset_dict.json"):
        (data / name).write_text('{"step": 7}')
    assert plan_of(data, tmp_path / "run").num_rows == 1
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(data)
    plan = plan_of(data, tmp_path / "run")
    assert plan.num_rows == 2 and plan.facts.left_out == {"beside a saved data set": 1}


def test_feather_is_arrow(tmp_path: Path) -> None:
    (tmp_path / "x.feather").write_bytes(ipc(tmp_path / "x.arrow", caption=["a sofa"]).read_bytes())
    assert len(read(tmp_path / "x.feather", tmp_path)) == 1
    (tmp_path / "x.feather").write_bytes(b"FEA1" + b"\0" * 100)
    with pytest.raises(AuditError, match="Feather version 1: write it again"):
        plan_of(tmp_path / "x.feather", tmp_path / "run")
