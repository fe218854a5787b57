"""Captions without measure: a line, a record, a cell or a table larger than any text is one line of error or is read,
and memory stays bounded.
"""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.captions import read_shard, text_lines
from tests.audit.captions.test_captions_found import plan_of, read, rows_of

PLAN = """
import resource, sys
from tests.audit.captions.test_captions_found import plan_of
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = plan_of(sys.argv[1], sys.argv[2])
print(plan.num_rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_ten_thousand_columns(tmp_path: Path) -> None:
    table = {f"c{at}": [1.0, 2.0] for at in range(10_000)}
    pq.write_table(pa.table({**table, "caption": ["a", "b"]}), tmp_path / "x.parquet", row_group_size=1)
    assert [row["caption"] for row in read(tmp_path / "x.parquet", tmp_path)] == ["a", "b"]
    with pytest.raises(AuditError) as error:
        plan_of(tmp_path / "x.parquet", tmp_path / "run", caption_col="nope")
    assert len(str(error.value)) < 1000


def test_a_caption_of_five_megabytes_is_read_as_it_is(tmp_path: Path) -> None:
    long = "word " * 1_000_000
    pq.write_table(pa.table({"caption": [long, "a sofa", long + "x"]}), tmp_path / "x.parquet")
    plan = plan_of(tmp_path / "x.parquet", tmp_path / "run")
    assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == [long, "a sofa", long + "x"]
    assert plan.num_unique == 3


def test_more_captions_than_a_shard_can_hold_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.captions.SHARD_BYTES", 10_000)  # for two gigabytes
    pq.write_table(pa.table({"caption": ["word " * 1000] * 4}), tmp_path / "x.parquet", use_dictionary=False)
    plan = plan_of(tmp_path / "x.parquet", tmp_path / "run")
    with pytest.raises(AuditError, match=r"x.parquet: rows 0 to 3 hold more captions .* fewer --rows-per-shard"):
        rows_of(plan, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_many_long_captions_are_held_few_at_a_time(tmp_path: Path, kind: str) -> None:
    """400 MB of captions of a megabyte, in one row group or batch, which pack to nothing."""
    texts = [f"{row} " + "word " * 200_000 for row in range(400)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"caption": texts}), path, compression="zstd", use_dictionary=False)
    elif kind == "arrow":
        table = pa.table({"caption": texts})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        with open(path, "w") as file:
            file.writelines(f'{{"caption": "{text}"}}\n' for text in texts)
    del texts
    command = [sys.executable, "-c", PLAN, str(path), str(tmp_path / "run")]
    rows, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert rows == 400 and grown < (600 if kind == "arrow" else 330)  # of a mapped file what was read counts too


@pytest.mark.slow
@pytest.mark.parametrize("typed", [True, False])
def test_a_long_caption_repeated_without_end_is_never_written_out(tmp_path: Path, typed: bool) -> None:
    """50 kB of Parquet that stand for 4 GB: the caption once, and references to it."""
    once = pa.array(["word " * 200_000, "a sofa"])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000 + [1, None], pa.int32()), once)
    pq.write_table(pa.table({"caption": column}), tmp_path / "x.parquet", store_schema=typed)
    command = [sys.executable, "-c", PLAN, str(tmp_path / "x.parquet"), str(tmp_path / "run")]
    rows, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert rows == 4002 and grown < 300
    plan = plan_of(tmp_path / "x.parquet", tmp_path / "again", rows_per_shard=100)
    assert plan.num_unique == 2
    texts = read_shard(plan, 40, Folder(str(tmp_path / "again")))["caption"].to_pylist()
    assert texts == ["a sofa", None]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The limit of a line brought from 64 MiB to 1 MiB, so that going past it takes no minutes."""
    from audit.captions import csv_rows, json_rows

    for module in (text_lines, csv_rows, json_rows):
        monkeypatch.setattr(module, "LONGEST", 1 << 20)
    before = csv.field_size_limit(1 << 20)
    yield 1 << 20
    csv.field_size_limit(before)


@pytest.fixture
def peak() -> Iterator[None]:
    """Python's own memory, of which lines are, stays below 40 MiB."""
    tracemalloc.start()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 40 << 20


@pytest.mark.parametrize(
    ("name", "head", "piece"),
    [
        ("x.jsonl", b'{"caption": "', b"word " * 1000),
        ("x.json", b'[{"caption": "', b"word " * 1000),
        ("x.csv", b"caption\n", b"word " * 1000),
        ("x.csv", b'caption\n"', b"word " * 999 + b"or \n"),  # a quote that is never closed
        ("x.csv", b"", b"\0" * 5000),
        ("x.json", b'{"a": {"caption": "', b"word " * 1000),
    ],
)
def test_a_text_without_end(tmp_path: Path, short: int, peak: None, name: str, head: bytes, piece: bytes) -> None:
    """A packed text of 50 MB in a file of 50 kB: refused once the limit is passed, not unpacked whole."""
    with gzip.open(tmp_path / f"{name}.gz", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(10_000):
            file.write(piece)
    with pytest.raises(AuditError) as error:
        plan_of(tmp_path / f"{name}.gz", tmp_path / "run")
    assert len(str(error.value)) < 1000 and f"{name}.gz" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["array", "records"])
def test_a_long_document_on_one_line(tmp_path: Path, short: int, peak: None, form: str) -> None:
    """What json.dump writes is one line, however many records it has: it is read in pieces."""
    texts = [f"{row} é " + "word " * 200 for row in range(6000)]
    records = [{"caption": text} for text in texts]
    content = json.dumps(records if form == "array" else {str(at): each for at, each in enumerate(records)})
    (tmp_path / "x.json").write_text(content)
    del content, records
    plan = plan_of(tmp_path / "x.json", tmp_path / "run", rows_per_shard=10_000)
    assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == texts


def test_a_character_at_the_limit_of_a_piece(tmp_path: Path, short: int) -> None:
    for shift in range(4):
        content = json.dumps([{"caption": "x" * shift + "日" * 349_000}, {"caption": "é"}], ensure_ascii=False)
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
        assert read(tmp_path / "x.json", tmp_path)[0]["caption"] == "x" * shift + "日" * 349_000
