"""Caption inputs: what is found, and what is refused in one line before any work."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import captions
from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.run.schema import SCORE_COLUMNS


def make_plan(*inputs: str, **changed: object) -> captions.CaptionPlan:
    options: dict = {"caption_col": None, "keep_cols": None, "limit": None, "rows_per_shard": 100, **changed}
    return captions.plan_captions(inputs, staging=Folder("run"), reserved=SCORE_COLUMNS, **options)


def parquet(path: str, table: dict | None = None) -> bytes:
    """1000 captions in ten row groups, uncompressed."""
    content = table or {"TEXT": [f"caption number {row}" for row in range(1000)], "width": list(range(1000))}
    pq.write_table(pa.table(content), path, row_group_size=100, compression="none", use_dictionary=False)
    return Path(path).read_bytes()


def ipc(path: str) -> bytes:
    table = pa.table({"text": [f"caption {row}" for row in range(1000)]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return Path(path).read_bytes()


def zipped(path: str) -> bytes:
    return gzip.compress(b'{"caption": "a"}\n' * 1000)


BAD: dict[str, tuple[str, Callable[[str], bytes], str]] = {
    "0 bytes": ("x.parquet", lambda path: b"", "the file is empty (0 bytes)"),
    "0 bytes of CSV": ("x.csv", lambda path: b"", "the file is empty (0 bytes)"),
    "no parquet": (
        "x.parquet",
        lambda path: b"<!DOCTYPE html>",
        "not a Parquet file: it starts with b'<!DOCTYPE html>'",
    ),
    "LFS pointer": (
        "x.parquet",
        lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "git-LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "cut in the middle": ("x.parquet", lambda path: parquet(path)[:20_000], "cut short (20000 bytes, no footer"),
    "hole before the footer": ("x.parquet", lambda path: parquet(path)[:99] + parquet(path)[9000:], "damaged: its row"),
    "overwritten pages": (
        "x.parquet",
        lambda path: parquet(path)[:99] + b"\xff" * 8901 + parquet(path)[9000:],
        "damaged",
    ),
    "footer of nothing": ("x.parquet", lambda path: b"PAR1" + b"\xff" * 20 + b"PAR1", "cut short or damaged"),
    "no rows": ("x.parquet", lambda path: parquet(path, {"TEXT": pa.array([], pa.string())}), "no rows"),
    "no caption column": (
        "x.parquet",
        lambda path: parquet(path, {"URL": ["u"], "title": ["t"]}),
        "no caption column; it has URL, title: pass --caption-col NAME",
    ),
    "captions are lists": (
        "x.parquet",
        lambda path: parquet(path, {"captions": [["a", "b"]], "n": [1]}),
        "column 'captions' is list<element: string>, several captions a row; it has captions, n: "
        "pass --caption-col captions for a row a caption",
    ),
    "cut Arrow": ("x.arrow", lambda path: ipc(path)[:9000], "cut short or damaged"),
    "no Arrow": ("x.arrow", lambda path: b"what is this?", "cut short or damaged"),
    "JSON array cut short": ("x.json", lambda path: b'[\n{"caption": "a"},\n{"capt', "not JSON, or cut short"),
    "JSON array of texts": ("x.json", lambda path: b'["a sofa"]', "item 1 of the JSON array is str, not an object"),
    "JSON array and more": ("x.json", lambda path: b'[{"caption": "a"}]\n{}', "not JSON: '{' after its end"),
    "JSON of lists": (
        "x.json",
        lambda path: b'{\n "annotations": [{"caption": "a"}]\n}',
        "one JSON object, in which 'annotations' is an array; records are read one a line, as an array, or as an "
        "object of records; its records lie in an array: jq -c '.[\"annotations\"][]'",
    ),
    "JSON nested too deep": ("x.jsonl", lambda path: b'{"caption": "a", "x": ' + b"[" * 200_000, "nested too deep"),
    "array nested too deep": ("x.json", lambda path: b"[" * 200_000, "nested too deep"),
    "captions in JSON lists": (
        "x.jsonl",
        lambda path: b'{"caption": ["a", "b"]}',
        "line 1: 'caption' is list, not text: pass --caption-col caption for a row a caption",
    ),
    "TSV without a header": (
        "x.tsv",
        lambda path: b"https://example.org/0.jpg\ta photo of a table\n" * 2,
        "; its first line reads like a row: pass --no-header",
    ),
    "CSV with semicolons": (
        "x.csv",
        lambda path: b"id;caption\n1;a photo\n",
        "no caption column; it has id;caption: pass --caption-col NAME; its first line reads like a row: "
        "pass --delimiter ';'",
    ),
    "no JSON": (
        "x.jsonl",
        lambda path: b'{"caption": "a"}\n\n{"caption": \n',
        "line 3 is not JSON: Expecting value at character 12",
    ),
    "late bad line": ("x.jsonl", lambda path: b'{"caption": "a"}\n' * 20000 + b"{", "line 20001 is not JSON"),
    "JSON in Latin-1": ("x.jsonl", lambda path: b'{"caption": "a"}\n{"caption": "\xe9"}', "line 2: not UTF-8"),
    "number for a caption": (
        "x.jsonl",
        lambda path: b'{"caption": "a"}\n{"caption": 3}',
        "line 2: 'caption' is int, not text",
    ),
    "cut gzip": ("x.jsonl.gz", lambda path: zipped(path)[:-20], "cut short or damaged"),
    "no gzip": ("x.jsonl.gz", lambda path: b'{"caption": "a"}', "cut short or damaged"),
    "fields missing": ("x.csv", lambda path: b"id,caption\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
    "open quote": ("x.csv", lambda path: b'id,caption\n1,"a\n2,b\n', "line 3: not CSV: unexpected end of data"),
    "CSV in Latin-1": (
        "x.csv",
        lambda path: b"id,caption\n1,a\n2,\xe9\n",
        "not UTF-8: invalid continuation byte: pass --encoding",
    ),
    "header alone": ("x.csv", lambda path: b"id,caption\n", "no rows"),
    "two of a name": ("x.csv", lambda path: b"caption,caption\na,b\n", "two columns are called 'caption': rename one"),
    "unknown kind": ("x.txt", lambda path: b"a cat\n", "unsupported kind of file; captions are read from .parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, message = BAD[case]
    data = content(name)
    Path(name).write_bytes(data)
    parquet("good.parquet")
    with pytest.raises(AuditError) as error:
        make_plan(name)
    assert str(error.value).startswith(f"{tmp_path / name}: ") or str(error.value).startswith(f"{name}: ")
    assert message in str(error.value) and "\n" not in str(error.value)
    if message != "no rows":
        with pytest.raises(AuditError):
            make_plan("good.parquet", name)


def test_empty_part_among_others_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parquet("part-0.parquet", {"TEXT": pa.array([], pa.string())})
    parquet("part-1.parquet")
    Path("part-2.csv").write_text("TEXT\n")
    plan = make_plan("part-0.parquet", "part-1.parquet", "part-2.csv")
    assert [file.rows for file in plan.files] == [0, 1000, 0]
    assert plan.shards["file_index"].to_pylist() == [1] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_col": "text"}, "x.parquet: no column 'text'; it has TEXT, width: pass another --caption-col"),
        ({"caption_col": "width"}, "x.parquet: column 'width' is int64, not text"),
        ({"keep_cols": ("height",)}, "--keep-cols height: no input has one column of that name"),
        ({"keep_cols": ("url", "URL")}, "--keep-cols url: another of the columns differs in case alone"),
        ({"keep_cols": ("ld",)}, "--keep-cols ld: a run has a column of that name itself"),
        ({"limit": 0}, "--limit 0: at least 1"),
        ({"rows_per_shard": 0}, "--rows-per-shard 0: at least 1"),
    ],
)
def test_bad_option_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet("x.parquet")
    with pytest.raises(AuditError) as error:
        make_plan("x.parquet", **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.parquet", "gone.parquet: no such file or folder"),
        ("gone/x.parquet", "gone/x.parquet: no such file or folder"),
        ("./gone/folder", "./gone/folder: no such file or folder"),
        ("gone*.parquet", "gone*.parquet: no file there that captions are read from: .parquet, .arrow"),
        ("nothing", "nothing: no file there that captions are read from"),
        ("memory://gone/x.parquet", "memory://gone/x.parquet: no such file or folder"),
        ("bucket://a/b.parquet", "bucket://a/b.parquet: cannot be listed: Protocol not known: bucket"),
    ],
)
def test_missing_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("nothing/stats.json").write_text("{}")
    with pytest.raises(AuditError) as error:
        make_plan(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.slow
def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    code = "import sys; from audit import captions; captions.describe_captions(['someone/captions@main:train'])"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1 and "AuditError: someone/captions@main:train: no such file or folder, and no data" in last
    )


def test_files_found_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.parquet", "a/c.parquet", "a/.hidden.parquet", "a/_temporary/d.parquet"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        parquet(name)
    Path("a/x.jsonl").write_text('{"caption": "a"}\n')
    Path("a/00000_stats.json").write_text("{}")
    everything = ["a/c.parquet", "a/x.jsonl", "b.parquet"]

    def found(*inputs: str) -> list[str]:
        return [os.path.relpath(source.path) for source in captions.find_captions(inputs).sources]

    assert found(".") == found("b.parquet", "a") == found("a/*", "b.*", "./b.parquet") == everything
    assert found("**/c.parquet") == ["a/c.parquet"]
    assert found("a/00000_stats.json") == found("a/*.json") == ["a/00000_stats.json"], "named, a .json file is read"
    assert found(f"file://{tmp_path}/b.parquet") == ["b.parquet"]
    Path("[a] b.parquet").write_bytes(parquet("b.parquet"))
    assert found("[a] b.parquet") == ["[a] b.parquet"], "a name that exists is no pattern"


def test_existing_folder_wins_over_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    parquet("owner/name/x.parquet")
    assert [source.format for source in captions.find_captions(["owner/name"]).sources] == ["parquet"]
    assert [source.format for source in captions.find_captions(["owner/other", "owner/other@v1.0:train"]).sources] == [
        "dataset"
    ] * 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "text", "caption", "TEXT"], "TEXT"),
        (["prompt", "text", "caption"], "caption"),
        (["prompt", "text"], "text"),
        (["Prompt", "Caption", "url"], "Caption"),
        (["PROMPT", "url"], "PROMPT"),
    ],
)
def test_caption_column_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet("x.parquet", {name: [f"from {name}"] for name in columns})
    plan = make_plan("x.parquet")
    assert plan.files[0].caption_col == expected
    assert captions.read_shard(plan, 0, Folder("run"))["caption"].to_pylist() == [f"from {expected}"]


def test_first_column_of_text_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parquet("x.parquet", {"text": [[1]], "prompt": ["a"]})
    assert make_plan("x.parquet").files[0].caption_col == "prompt"
