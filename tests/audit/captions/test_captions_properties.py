"""Any table: rows in are rows out, in order, with the captions as they are, and equal captions found as a dict does."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit import captions
from audit.base.storage import Folder

WORDS = st.sampled_from(
    ["", " ", "a sofa", "a sofa ", "été", "日本", 'say "x", y', "two\nlines", "\t", '["x"]', "null"]
)
CAPTION = st.one_of(st.none(), WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
PART = st.lists(CAPTION, max_size=9)
STRINGS = st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), "dictionary", "null where it can be"])
KEYS = st.sampled_from([pa.int64(), pa.int32(), pa.float64(), pa.string(), pa.null()])
FORMAT = st.sampled_from(["parquet", "arrow", "stream", "jsonl", "json", "csv"])


def column(texts: list[str | None], kind: Any) -> pa.Array:
    if kind == "dictionary":
        return pa.array(texts, pa.string()).dictionary_encode()
    if kind == "null where it can be":
        return pa.array(texts, pa.null() if {*texts} == {None} else pa.string())
    return pa.array(texts, kind)


def write(path: Path, kind: str, table: pa.Table, group: int) -> Path:
    path = path.with_suffix({"stream": ".arrow", "json": ".json"}.get(kind, f".{kind}"))
    rows = table.to_pylist()
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=group)
    elif kind in ("arrow", "stream"):
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) or "\n")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        with open(path, "w", newline="") as file:
            writer_ = csv.writer(file)
            writer_.writerow(table.schema.names)
            writer_.writerows(["" if value is None else value for value in row.values()] for row in rows)
    return path


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(PART, FORMAT, STRINGS, KEYS), min_size=1, max_size=4),
    group=st.integers(1, 4),
    per_shard=st.integers(1, 7),
    limit=st.one_of(st.none(), st.integers(1, 12)),
)
def test_rows_in_are_rows_out(parts: list[Any], group: int, per_shard: int, limit: int | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected: list[tuple[str | None, bool]] = []
        keys: list[int | None] = []
        paths = []
        for number, (texts, kind, strings, key_kind) in enumerate(parts):
            if kind in ("json", "jsonl") and not texts:
                texts = ["a sofa"]  # of no record no column is known
            plain = kind in ("json", "jsonl", "csv")
            values = range(100 * number, 100 * number + len(texts))
            ids = pa.nulls(len(texts)) if pa.types.is_null(key_kind) else pa.array(values).cast(key_kind)
            shown = pa.array(texts, pa.string()) if plain else column(texts, strings)
            table = pa.table({"caption": shown, "key": ids})
            paths.append(str(write(folder / f"{number}", kind, table, group)))
            expected += [(text, kind == "csv") for text in texts]
            keys += [None if pa.types.is_null(key_kind) else value for value in values]
        if not expected:
            return
        staging = Folder(str(folder / "run"))
        plan = captions.plan_captions(
            paths, caption_col="caption", keep_cols=("key",), limit=limit, rows_per_shard=per_shard, staging=staging
        )
        rows = [row for at in range(len(plan)) for row in captions.read_shard(plan, at, staging).to_pylist()]
        duplicates = [int(of) for at in range(len(plan)) for of in plan.duplicates(at)]
        wanted = expected[:limit]
        assert plan.num_rows == len(rows) == len(wanted)
        for row, (text, is_csv) in zip(rows, wanted, strict=True):
            assert row["caption"] == (text or "" if is_csv else text)  # CSV has no null
        for row, key in zip(rows, keys[:limit], strict=True):
            found = row["key"]
            assert found in (None, "") if key is None else int(float(found)) == key
        plan.save(staging)
        ids = [(shard << 32) | row for shard, n in enumerate(plan.shards["row_count"].to_pylist()) for row in range(n)]
        first: dict[str, int] = {}
        for row, id, of in zip(rows, ids, duplicates, strict=True):
            text = row["caption"]
            if text is None or not text.strip():
                assert of == -1
            else:
                assert of == first.get(text, -1)
                first.setdefault(text, id)
        assert plan.num_unique == len(first)
