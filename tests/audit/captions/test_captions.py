"""Captions: rows as another reader sees them, equal captions as a dict finds them, plans that survive their folder."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import captions
from audit.base.errors import AuditError
from audit.base.storage import Folder

datasets.disable_progress_bars()
WORDS = ["sofa", "Poster", "chat noir", "été", "日本", "a,b", 'say "x"', "two\nlines", "🦊", "tail "]


def make_plan(inputs: list[Any], staging: Any, **changed: Any) -> captions.CaptionPlan:
    options = {"caption_col": None, "keep_cols": None, "limit": None, "rows_per_shard": 100, **changed}
    return captions.plan_captions([str(path) for path in inputs], staging=Folder(str(staging)), **options)


def unread(plan: captions.CaptionPlan) -> list[captions.CaptionFile]:
    """A plan's files as they are described before they are read and staged."""
    return [
        replace(file, rows=-1 if file.format in ("jsonl", "csv") else file.rows, staged=None) for file in plan.files
    ]


def all_rows(plan: captions.CaptionPlan, staging: Any) -> list[dict[str, Any]]:
    folder = Folder(str(staging))
    return [row for shard in range(len(plan)) for row in captions.read_shard(plan, shard, folder).to_pylist()]


def some_captions(rows: int, seed: int) -> list[str | None]:
    pick = random.Random(seed)
    made = [" ".join(pick.choices(WORDS, k=pick.randint(1, 3))) for _ in range(rows)]
    return [pick.choice([None, "", " \n\t", caption]) if at % 50 == 0 else caption for at, caption in enumerate(made)]


def write_ipc(path: Path, table: pa.Table, batch_rows: int) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts that differ in format, column order, string width, nullability and row group size."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "deep").mkdir()
    texts = [some_captions(rows, rows) for rows in (1000, 501, 333, 777, 64, 90)]
    urls = [[f"http://x/{part}/{row}" for row in range(len(rows))] for part, rows in enumerate(texts)]
    one = pa.table({"URL": urls[0], "TEXT": texts[0], "similarity": np.random.default_rng(0).random(1000)})
    pq.write_table(one, folder / "0.parquet", row_group_size=130)
    filled = [text or "" for text in texts[1]]
    schema = pa.schema([pa.field("TEXT", pa.large_string(), nullable=False), ("extra", pa.list_(pa.int8()))])
    two = pa.table({"TEXT": filled, "extra": [[1]] * 501}, schema=schema)
    pq.write_table(two, folder / "1.parquet", compression="zstd")
    three = pa.table({"TEXT": pa.array(texts[2]).dictionary_encode(), "URL": pa.array(urls[2], pa.large_string())})
    pq.write_table(three, folder / "deep" / "2.parquet", row_group_size=200)
    write_ipc(folder / "deep" / "3.arrow", pa.table({"n": range(777), "url": urls[3], "TEXT": texts[3]}), 100)
    with open(folder / "deep" / "4.jsonl", "w") as file:
        file.writelines(json.dumps({"URL": u, "TEXT": t}) + "\n" for u, t in zip(urls[4], texts[4], strict=True))
    pd.DataFrame({"TEXT": texts[5], "URL": urls[5]}).to_csv(folder / "deep" / "5.csv.gz", index=False)
    return folder


def read_with_pandas(folder: Path) -> list[tuple[str | None, str | None]]:
    """The same parts, read whole by pandas: (caption, url) in path order."""
    frames = [
        pd.read_parquet(folder / "0.parquet"),
        pd.read_parquet(folder / "1.parquet").assign(URL=None),
        pd.read_parquet(folder / "deep" / "2.parquet"),
        pd.read_feather(folder / "deep" / "3.arrow").rename(columns={"url": "URL"}),
        pd.read_json(folder / "deep" / "4.jsonl", lines=True),
        pd.read_csv(folder / "deep" / "5.csv.gz", keep_default_na=False),
    ]
    pairs = [pair for frame in frames for pair in zip(frame["TEXT"], frame["URL"], strict=True)]
    return [tuple(value if isinstance(value, str) else None for value in pair) for pair in pairs]


@pytest.mark.parametrize("rows_per_shard", [1, 7, 100, 130, 8192])
def test_rows_are_what_pandas_reads(parts: Path, tmp_path: Path, rows_per_shard: int) -> None:
    expected = read_with_pandas(parts)
    plan = make_plan([parts], tmp_path, rows_per_shard=rows_per_shard)
    assert [(row["caption"], row["URL"]) for row in all_rows(plan, tmp_path)] == expected
    assert plan.keep_cols == ["URL"] and plan.num_rows == len(expected) == 2765
    assert max(plan.shards["row_count"].to_pylist()) <= rows_per_shard
    assert plan.num_empty == sum(1 for caption, _ in expected if caption is None or not caption.strip())
    assert plan.num_unique == len({caption for caption, _ in expected if caption and caption.strip()})


def test_shards_read_in_any_order(parts: Path, tmp_path: Path) -> None:
    plan, folder = make_plan([parts], tmp_path, rows_per_shard=37), Folder(str(tmp_path))
    forward = [captions.read_shard(plan, shard, folder) for shard in range(len(plan))]
    order = random.Random(1).choices(range(len(plan)), k=200)
    assert all(captions.read_shard(plan, shard, folder).equals(forward[shard]) for shard in order)
    assert len({table.schema for table in forward}) == 1, "every shard has the same columns and types"


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_shard", [1, 64, 1000])
def test_duplicates_are_what_a_dict_finds(parts: Path, tmp_path: Path, rows_per_shard: int) -> None:
    plan = make_plan([parts], tmp_path, rows_per_shard=rows_per_shard)
    folder = Folder(str(tmp_path))
    plan.save(folder)
    loaded = captions.CaptionPlan.load(folder)
    seen: dict[str, int] = {}
    for shard in range(len(plan)):
        expected = []
        for row, caption in enumerate(captions.read_shard(loaded, shard, folder)["caption"].to_pylist()):
            blank = caption is None or not caption.strip()
            first = -1 if blank else seen.setdefault(caption, shard << 32 | row)
            expected.append(-1 if first == (shard << 32 | row) else first)
        assert plan.duplicates(shard).tolist() == loaded.duplicates(shard).tolist() == expected
        assert plan.duplicates(shard).dtype == loaded.duplicates(shard).dtype == np.int64
    assert plan.num_unique == len(seen)


def test_duplicates_over_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.captions.repeats.PART_ROWS", 2000)
    numbers = np.random.default_rng(3).integers(0, 25_000, 60_000)
    pq.write_table(pa.table({"text": numbers.astype("U")}), tmp_path / "many.parquet")
    plan = make_plan([tmp_path / "many.parquet"], tmp_path, rows_per_shard=5000)
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    expected = first[inverse]
    for shard in range(len(plan)):
        rows = np.arange(shard * 5000, (shard + 1) * 5000)
        of = plan.duplicates(shard)
        found = np.where(of < 0, rows, (of >> 32) * 5000 + (of & 0xFFFFFFFF))
        assert np.array_equal(found, expected[rows])
    assert plan.num_unique == len(first)


def test_captions_are_compared_exactly(tmp_path: Path) -> None:
    values = ["a cat", "A cat", "a cat ", "a  cat", "a cat", "e\u0301", "\u00e9", " ", None, "", "\u3000"]
    pq.write_table(pa.table({"caption": values}), tmp_path / "x.parquet")
    plan = make_plan([tmp_path / "x.parquet"], tmp_path)
    assert plan.duplicates(0).tolist() == [-1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1]
    assert (plan.num_rows, plan.num_unique, plan.num_empty) == (11, 6, 4)
    assert captions.is_empty(pa.array(values)).tolist() == [False] * 7 + [True] * 4


@pytest.mark.parametrize("limit", [1, 1000, 1001, 1834, 2615, 2675, 99999])
def test_limit_takes_the_first_rows_of_the_list(parts: Path, tmp_path: Path, limit: int) -> None:
    expected = read_with_pandas(parts)[:limit]
    plan = make_plan([parts], tmp_path, limit=limit)
    assert [row["caption"] for row in all_rows(plan, tmp_path)] == [caption for caption, _ in expected]
    assert plan.num_rows == len(expected)
    assert captions.describe_captions([str(parts)]) == unread(plan)


def test_plan_keeps_itself_in_its_folder(parts: Path, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    plan = make_plan([parts], tmp_path, rows_per_shard=64)
    plan.save(folder)
    loaded = captions.CaptionPlan.load(folder)
    assert loaded.files == plan.files and loaded.shards.equals(plan.shards) and loaded.keep_schema == plan.keep_schema
    assert (loaded.num_rows, loaded.num_unique, loaded.num_empty) == (plan.num_rows, plan.num_unique, plan.num_empty)
    assert [captions.CaptionFile.from_dict(json.loads(json.dumps(f.to_dict()))) for f in plan.files] == plan.files
    table = pa.ipc.open_file(tmp_path / "plan.arrow").read_all()
    assert table["shard_id"].to_pylist() == list(range(len(plan)))
    (tmp_path / "plan.arrow").write_bytes((tmp_path / "plan.arrow").read_bytes()[:-5])
    with pytest.raises(AuditError, match=r"plan\.arrow: damaged"):
        captions.CaptionPlan.load(folder)
    with pytest.raises(AuditError, match=r"plan\.arrow: missing"):
        captions.CaptionPlan.load(Folder(str(tmp_path / "elsewhere")))


def test_urls_in_and_out(parts: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{parts}/", "/lists/", recursive=True)
    try:
        folder = Folder("memory://run")
        plan = captions.plan_captions(
            ["memory://lists/*.parquet", "memory://lists/deep"],
            caption_col=None,
            keep_cols=None,
            limit=None,
            rows_per_shard=200,
            staging=folder,
        )
        plan.save(folder)
        loaded = captions.CaptionPlan.load(folder)
        rows = [row for shard in range(len(plan)) for row in captions.read_shard(loaded, shard, folder).to_pylist()]
        assert [(row["caption"], row["URL"]) for row in rows] == read_with_pandas(parts)
        assert [loaded.duplicates(i).tolist() for i in range(3)] == [plan.duplicates(i).tolist() for i in range(3)]
        assert all(file.path.startswith("memory://") for file in plan.files)
    finally:
        memory.rm("/lists", recursive=True)
        memory.rm("/run", recursive=True)


def test_changed_input_is_seen(tmp_path: Path) -> None:
    """Also where the edit changes neither the size nor the footer of a file."""
    parquet, lines = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    pq.write_table(pa.table({"text": ["a cat", "b cat"]}), parquet, compression="none", write_statistics=False)
    lines.write_text('{"text": "c"}\n')
    plan = make_plan([parquet, lines], tmp_path / "run")
    inputs = [str(parquet), str(lines)]
    assert captions.describe_captions(inputs) == unread(plan)
    parquet.write_bytes(parquet.read_bytes().replace(b"a cat", b"a dog"))
    lines.write_text('{"text": "d"}\n')
    changed = captions.describe_captions(inputs)
    assert [new.footer_sha256 != old.footer_sha256 for new, old in zip(changed, plan.files, strict=True)] == [
        True,
        True,
    ]


def test_input_replaced_after_planning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    plan = make_plan([path], tmp_path)
    pq.write_table(pa.table({"text": ["longer", "b", "c"]}), path)
    with pytest.raises(AuditError, match=r"a\.parquet: changed since it was planned"):
        captions.read_shard(plan, 0, Folder(str(tmp_path)))


def test_kept_columns_have_one_type_in_every_shard(tmp_path: Path) -> None:
    first = {"TEXT": ["a"], "SAMPLE_ID": pa.array([2**53 + 1], pa.int64()), "hash": pa.array([1], pa.int32())}
    pq.write_table(
        pa.table({**first, "Key": ["k"], "width": [3], "id": pa.array([None], pa.null())}), tmp_path / "a.parquet"
    )
    second = {"TEXT": ["b"], "SAMPLE_ID": [0.5], "hash": pa.array([2**40], pa.int64()), "key": ["l"]}
    pq.write_table(pa.table({**second, "id": [7]}), tmp_path / "b.parquet")
    inputs = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    rows = all_rows(make_plan(inputs, tmp_path), tmp_path)
    assert rows == [
        {"caption": "a", "SAMPLE_ID": "9007199254740993", "hash": 1, "Key": "k", "id": None},
        {"caption": "b", "SAMPLE_ID": "0.5", "hash": 2**40, "Key": "l", "id": 7},
    ]
    rows = all_rows(make_plan(inputs, tmp_path, keep_cols=("width", "TEXT")), tmp_path)
    assert rows == [{"caption": "a", "width": 3, "TEXT": "a"}, {"caption": "b", "width": None, "TEXT": "b"}]
    assert make_plan(inputs, tmp_path, keep_cols=()).keep_cols == []


def test_text_formats(tmp_path: Path) -> None:
    """Values exactly as written: leading zeros, quoted newlines, a BOM, missing keys, lone surrogates."""
    csv = b'\xef\xbb\xbfid,caption\r\n007,"a, ""b""\r\nc"\r\n\r\n8,\r\n'
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(csv)
    (tmp_path / "b.json").write_text(
        '{"caption": "x", "id": 7}\n\n{"id": {"n": 1}}\n{"caption": "\\ud800y \\ud83e\\udd8a"}'
    )
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink:
        table = pa.table({"id": ["9", "10"], "caption": ["s", None]})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    names = ["a.csv.gz", "b.json", "c.arrow"]
    rows = all_rows(make_plan([tmp_path / name for name in names], tmp_path), tmp_path)
    assert [tuple(row.values()) for row in rows] == [
        ('a, "b"\r\nc', "007"),
        ("", "8"),
        ("x", "7"),
        (None, '{"n": 1}'),
        ("?y 🦊", None),
        ("s", "9"),
        (None, "10"),
    ]


def test_folders_behind_links_are_read_and_what_we_wrote_is_not(tmp_path: Path) -> None:
    data, far = tmp_path / "data", tmp_path / "far"
    for folder in (data / "plain", far, data / "run" / "input", data / "index" / "parts", data / "report" / "exports"):
        folder.mkdir(parents=True)
    for path in (data / "plain/a.csv", far / "b.csv", data / "run/input/c.csv", data / "index/parts/d.csv"):
        path.write_text(f"caption\n{path.stem}\n")
    (data / "report/exports/e.csv").write_text("caption\ne\n")
    for name, keys in OURS.items():
        (data / name).write_text(json.dumps(dict.fromkeys(keys, 1)))
    (data / "far").symlink_to(far)
    (far / "back").symlink_to(data)  # a circle ends
    for given in (data, data / "**" / "*.csv"):
        assert [Path(source.path).name for source in captions.find_captions([given]).sources] == ["b.csv", "a.csv"]
    assert [Path(source.path).name for source in captions.find_captions([data / "*" / "b.csv"]).sources] == ["b.csv"]


def test_a_blank_line_in_a_file_of_one_column_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("caption\nfirst\n\nthird\n")
    (tmp_path / "two.csv").write_text("caption,url\nfirst,u\n\nthird,v\n")
    for name, rows in (("one", ["first", "", "third"]), ("two", ["first", "third"])):
        plan = make_plan([tmp_path / f"{name}.csv"], tmp_path / name)
        assert [row["caption"] for row in all_rows(plan, tmp_path / name)] == rows


def test_a_long_field_beside_the_caption_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"caption,page\na sofa,{'x' * 200_000}\n")
    assert make_plan([tmp_path / "x.csv"], tmp_path / "run").num_rows == 1


def test_bytes_that_are_not_utf8_do_not_stop_a_run(tmp_path: Path) -> None:
    broken = pa.array([b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"TEXT": broken, "url": broken}), tmp_path / "x.parquet")
    rows = all_rows(make_plan([tmp_path / "x.parquet"], tmp_path), tmp_path)
    assert rows == [{"caption": "caf\ufffd", "url": "caf\ufffd"}, {"caption": "fine", "url": "fine"}]


def test_saved_data_sets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b", "a", None], "key": [1, 2, 3, 4], "other": [0] * 4})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    plan = make_plan([tmp_path / "one"], tmp_path / "run", rows_per_shard=3)
    expected = [{"caption": c, "key": k} for c, k in zip(["a", "b", "a", None], [1, 2, 3, 4], strict=True)]
    assert all_rows(plan, tmp_path / "run") == expected
    assert plan.files[0].format == "dataset" and plan.duplicates(0).tolist() == [-1, -1, 0]
    assert captions.describe_captions([str(tmp_path / "one")]) == unread(plan)
    split = make_plan([f"{tmp_path}/two:test"], tmp_path / "run")
    assert all_rows(split, tmp_path / "run") == [{"caption": "b", "key": 2}]
    with pytest.raises(AuditError, match=r"has the splits train, test: pass one, as .*two:train"):
        make_plan([tmp_path / "two"], tmp_path / "run")


OURS = {
    "run/run.json": ("format", "fingerprint", "digest", "shards"),
    "index/index.json": ("fingerprint", "descriptor_name", "facts"),
    "report/report.json": ("format", "made", "digest", "run"),
}

MEMORY = """
import sys, pyarrow
from audit import captions
from audit.base.storage import Folder
path, folder = sys.argv[1], Folder(sys.argv[2])
plan = captions.plan_captions(
    [path], caption_col=None, keep_cols=None, limit=None, rows_per_shard=1000, staging=folder
)
rows = sum(captions.read_shard(plan, shard, folder).num_rows for shard in range(len(plan)))
print(rows, pyarrow.default_memory_pool().max_memory() >> 20)
"""


@pytest.mark.slow
def test_a_giant_row_group_is_never_held_whole(tmp_path: Path) -> None:
    """200 MiB of captions in one row group are planned and read with a tenth of that."""
    texts = pa.array([f"{row} " + "word " * 200 for row in range(200_000)])
    pq.write_table(pa.table({"TEXT": texts}), tmp_path / "giant.parquet", row_group_size=200_000)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "giant.parquet"), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows, peak_mib = map(int, done.stdout.split())
    assert rows == 200_000
    assert peak_mib < 40
