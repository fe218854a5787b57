"""Captions as people have them: what real tables and folders look like, read whole, and what is left out said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import captions
from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.captions import TextFormat


def plan_of(inputs: Path | str | list[str], run: Path, **changed: Any) -> captions.CaptionPlan:
    options: dict[str, Any] = {"caption_col": None, "keep_cols": None, "limit": None, "rows_per_shard": 5, **changed}
    given = [str(each) for each in inputs] if isinstance(inputs, list) else [str(inputs)]
    return captions.plan_captions(given, staging=Folder(str(run)), **options)


def rows_of(plan: captions.CaptionPlan, run: Path) -> list[dict[str, Any]]:
    return [row for at in range(len(plan)) for row in captions.read_shard(plan, at, Folder(str(run))).to_pylist()]


def read(inputs: Path | str | list[str], tmp_path: Path, **changed: Any) -> list[dict[str, Any]]:
    return rows_of(plan_of(inputs, tmp_path / "run", **changed), tmp_path / "run")


# --- which column -------------------------------------------------------------------------------------------------


def test_the_column_with_text_wins_and_is_named(tmp_path: Path) -> None:
    texts = [f"a photo {row}" for row in range(12)]
    for number, missing in enumerate(([None] * 12, ["  "] * 12, [""] * 12)):
        table = pa.table({"TEXT": pa.array(missing, pa.string()), "caption": texts})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        plan = plan_of(tmp_path / f"{number}.parquet", tmp_path / "run")
        assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == texts
        assert plan.facts.caption_columns == {"caption": "TEXT has no text"}
        assert "captions from caption (TEXT has no text)" in plan.facts.lines(12, 12, 0)[0]
    pq.write_table(pa.table({"TEXT": ["", "b"], "caption": ["c", "d"]}), tmp_path / "both.parquet")
    plan = plan_of(tmp_path / "both.parquet", tmp_path / "run")
    assert plan.facts.caption_columns == {"TEXT": "before caption"} and plan.num_empty == 1


def test_the_column_with_text_wins_in_text_files_too(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("TEXT,caption\n,a sofa\n,a poster\n")
    (tmp_path / "x.jsonl").write_text('{"TEXT": null, "caption": "a sofa"}\n{"TEXT": "", "caption": "a poster"}\n')
    for name in ("x.csv", "x.jsonl"):
        assert [row["caption"] for row in read(tmp_path / name, tmp_path)] == ["a sofa", "a poster"]


def test_two_columns_of_one_name_beside_the_captions_are_said(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["u"]), pa.array(["a sofa"]), pa.array(["v"])], ["url", "caption", "url"])
    pq.write_table(table, tmp_path / "x.parquet")
    plan = plan_of(tmp_path / "x.parquet", tmp_path / "run")
    assert rows_of(plan, tmp_path / "run") == [{"caption": "a sofa"}]
    assert plan.facts.notes == ["url is not carried: several columns have that name"]


@pytest.mark.parametrize(
    "part",
    [
        pa.table({"URL": pa.nulls(0), "TEXT": pa.nulls(0)}),
        pa.table({"URL": pa.nulls(3), "TEXT": pa.nulls(3)}),
        pa.table({"URL": pa.array([], pa.string())}),
        pa.table({"URL": ["u"], "TEXT": pa.array([float("nan")])}),
    ],
)
def test_a_part_without_text_beside_others(tmp_path: Path, part: pa.Table) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table({"URL": ["a", "b"], "TEXT": ["one", "two"]}), folder / "part-0.parquet")
    pq.write_table(part, folder / "part-1.parquet")
    rows = read(folder, tmp_path)
    assert rows[:2] == [{"caption": "one", "URL": "a"}, {"caption": "two", "URL": "b"}]
    assert len(rows) == 2 + part.num_rows and all(row["caption"] is None for row in rows[2:])


# --- which files --------------------------------------------------------------------------------------------------


def test_a_file_called_report_json_is_no_report(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        pq.write_table(
            pa.table({"caption": [f"{name} {row}" for row in range(12)]}), tmp_path / "in" / name / "p.parquet"
        )
    for name in ("report.json", "run.json", "index.json", "index_info.json"):
        (tmp_path / "in" / "b" / name).write_text('{"rows": 12}')
    plan = plan_of(tmp_path / "in", tmp_path / "run")
    assert plan.num_rows == 24 and plan.facts.left_out == {".json, read where named": 4}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    data = tmp_path / "in"
    (data / ".cache").mkdir(parents=True)
    (data / "_logs").mkdir()
    for name in ("a.csv", ".cache/b.csv", "_logs/c.csv", ".d.csv"):
        (data / name).write_text("caption\na sofa\n")
    for name in ("x.jpg", "y.txt", "s.json"):
        (data / name).write_bytes(b"{}")
    plan = plan_of(data, tmp_path / "run")
    assert plan.num_rows == 1
    assert plan.facts.left_out == {"hidden": 3, "of other kinds": 2, ".json, read where named": 1}
    assert plan.facts.lines(1, 1, 0)[1] == "left out: 1 .json, read where named, 3 hidden, 2 of other kinds"


def test_a_plan_inside_the_scanned_folder_is_not_read(tmp_path: Path) -> None:
    """Staged captions and plans of a run whose planning was killed are told by what is in them."""
    (tmp_path / "a.csv").write_text("caption\na sofa\n")
    run = tmp_path / "out"
    plan = plan_of(tmp_path / "a.csv", run)
    plan.save(Folder(str(run)))
    again = plan_of(tmp_path, run)
    assert again.num_rows == 1 and again.facts.left_out == {"of be-audit's own": 3}


# --- types --------------------------------------------------------------------------------------------------------


def test_ids_of_two_types_are_kept_exact_as_text(tmp_path: Path) -> None:
    whole, gaps = [9_007_199_254_740_993, 12], [1234567.0, None, float("nan")]
    pq.write_table(pa.table({"caption": ["a", "b"], "id": whole}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"caption": ["c", "d", "e"], "id": pa.array(gaps)}), tmp_path / "1.parquet")
    rows = read([str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")], tmp_path)
    assert [row["id"] for row in rows] == ["9007199254740993", "12", "1234567", None, None]


def test_string_views_and_categories(tmp_path: Path) -> None:
    texts = ["a sofa", None, "été", "a sofa"]
    views = pa.table({"caption": pa.array(texts, pa.string_view()), "url": pa.array(list("abcd"), pa.string_view())})
    with pa.ipc.new_file(tmp_path / "x.arrow", views.schema) as writer:
        writer.write_table(views)
    frame = pd.DataFrame({"caption": pd.Categorical(texts), "url": pd.Categorical(list("abcd"))})
    frame.to_parquet(tmp_path / "x.parquet")
    expected = [{"caption": text, "url": url} for text, url in zip(texts, "abcd", strict=True)]
    for name in ("x.arrow", "x.parquet"):
        assert read(tmp_path / name, tmp_path) == expected


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_a_list_column_gives_a_row_a_caption(tmp_path: Path, kind: pa.DataType) -> None:
    lists = [["one", "two"], [], None, ["three", None, ""]]
    pq.write_table(pa.table({"captions": pa.array(lists, kind), "key": [7, 8, 9, 10]}), tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet", tmp_path, caption_col="captions")
    expected = [("one", 7), ("two", 7), (None, 8), (None, 9), ("three", 10), (None, 10), ("", 10)]
    assert [(row["caption"], row["key"]) for row in rows] == expected
    with pytest.raises(AuditError, match=r"several captions a row.*pass --caption-col captions for a row a caption"):
        plan_of(tmp_path / "x.parquet", tmp_path / "run")


def test_lists_written_as_json(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v"], "all_captions": ['["one", "tw\\u006f"]', "[]"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text(
        '{"url": "u", "all_captions": ["one", "two"]}\n{"url": "v", "all_captions": []}\n'
    )
    for name in ("x.parquet", "x.jsonl"):
        rows = read(tmp_path / name, tmp_path, caption_col="all_captions")
        assert [tuple(row.values()) for row in rows] == [("one", "u"), ("two", "u"), (None, "v")]


# --- JSON ---------------------------------------------------------------------------------------------------------

RECORDS = [
    {"caption": "a sofa", "key": "k0"},
    {"caption": None, "key": "k1"},
    {"caption": 'two\nlines, "quoted" { [', "key": "k2"},
    {"key": "k3"},
    {"caption": "日本 🦊", "key": "k4"},
]


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("form", ["array", "records", "lines"])
def test_json_in_three_forms(tmp_path: Path, form: str, indent: int | None) -> None:
    if form == "lines":
        content = "\n\n".join(json.dumps(record) for record in RECORDS)
    elif form == "array":
        content = json.dumps(RECORDS, indent=indent)
    else:
        content = json.dumps({record["key"]: {"caption": record.get("caption")} for record in RECORDS}, indent=indent)
    (tmp_path / "x.json").write_text("\n" + content)
    expected = [{"caption": record.get("caption"), "key": record["key"]} for record in RECORDS]
    assert read(tmp_path / "x.json", tmp_path) == expected


def test_a_json_array_longer_than_a_piece(tmp_path: Path) -> None:
    texts = [f"{row} " + "word " * (row % 700) for row in range(3000)]
    (tmp_path / "x.json").write_text(json.dumps([{"caption": text} for text in texts], indent=1))
    assert [row["caption"] for row in read(tmp_path / "x.json", tmp_path, rows_per_shard=5000)] == texts


def test_nan_and_lone_surrogates_in_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"caption": NaN}\n{"caption": "a \\ud83d sofa"}\n')
    assert [row["caption"] for row in read(tmp_path / "x.jsonl", tmp_path)] == [None, "a ? sofa"]


# --- CSV and TSV --------------------------------------------------------------------------------------------------


def test_a_dump_without_a_header(tmp_path: Path) -> None:
    lines = [f'https://example.org/{row}.jpg\t"a photo {row}, "quoted' for row in range(3)]
    (tmp_path / "cc12m.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "cc3m.tsv").write_text("".join(f"a photo {row}\thttps://example.org/{row}.jpg\n" for row in range(3)))
    with pytest.raises(AuditError, match="pass --no-header"):
        plan_of(tmp_path / "cc12m.tsv", tmp_path / "run")
    no_header = TextFormat.of(None, True, None)
    rows = read(tmp_path / "cc12m.tsv", tmp_path, text_format=no_header)
    assert rows[2] == {"caption": '"a photo 2, "quoted', "url": "https://example.org/2.jpg"} and len(rows) == 3
    assert read(tmp_path / "cc3m.tsv", tmp_path, text_format=no_header)[0] == {
        "caption": "a photo 0",
        "url": "https://example.org/0.jpg",
    }
    (tmp_path / "three.csv").write_text("1,a photo,x\n2,a sofa,y\n")
    with pytest.raises(AuditError, match="column_1, column_2, column_3: pass --caption-col NAME"):
        plan_of(tmp_path / "three.csv", tmp_path / "run", text_format=no_header)
    rows = read(tmp_path / "three.csv", tmp_path, text_format=no_header, caption_col="column_2")
    assert [row["caption"] for row in rows] == ["a photo", "a sofa"]


@pytest.mark.parametrize(("flag", "sign"), [("tab", "\t"), (";", ";"), ("pipe", "|")])
def test_other_delimiters(tmp_path: Path, flag: str, sign: str) -> None:
    (tmp_path / "x.csv").write_text(f'key{sign}caption\n1{sign}"a, {sign} sofa"\n')
    with pytest.raises(AuditError, match="pass --delimiter"):
        plan_of(tmp_path / "x.csv", tmp_path / "run")
    rows = read(tmp_path / "x.csv", tmp_path, text_format=TextFormat.of(flag, False, None))
    assert rows == [{"caption": f"a, {sign} sofa", "key": "1"}]


def quoting(kind: str | None) -> TextFormat:
    return TextFormat.of(None, False, None, kind)


@pytest.mark.parametrize(
    "lines",
    [
        ["url\tcaption", 'u0\t"a sofa', "u1\ta lamp", "u2\ta bed"],  # the quote is never closed
        ["url\tcaption", 'u0\t"a" sofa', "u1\ta lamp", "u2\ta bed"],
        ["url\tcaption", 'u0\t"a sofa', 'u1\ta lamp"', "u2\ta bed"],  # one row of two would be a field
        ["url\tcaption", 'u0\t"a sofa', 'u1"\ta lamp', "u2\ta bed"],
    ],
)
def test_quotes_that_are_letters(tmp_path: Path, lines: list[str]) -> None:
    """Of a table with a header whose captions hold quotes as they come, no row is lost: refused, with the flag."""
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(AuditError, match=r"x\.tsv: lines? .*pass --quoting none"):
        plan_of(tmp_path / "x.tsv", tmp_path / "run")
    rows = read(tmp_path / "x.tsv", tmp_path, text_format=quoting("none"))
    assert [f"{row['url']}\t{row['caption']}" for row in rows] == lines[1:]


def test_a_quoted_field_over_lines(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('url\tcaption\nu0\t"two\nlines"\nu1\t"a\t""b"""\n')
    texts = ["two\nlines", 'a\t"b"']
    assert [row["caption"] for row in read(tmp_path / "x.tsv", tmp_path)] == texts
    (tmp_path / "y.tsv").write_text('url\tcaption\nu0\t"two\n\tlines"\n')
    with pytest.raises(AuditError, match=r"lines 2 to 3: .*--quoting csv where it is one field"):
        plan_of(tmp_path / "y.tsv", tmp_path / "run")
    assert read(tmp_path / "y.tsv", tmp_path, text_format=quoting("csv"))[0]["caption"] == "two\n\tlines"


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["tsv", "jsonl", "json"])
def test_compressed_text(tmp_path: Path, kind: str, packing: str) -> None:
    content = {"tsv": "key\tcaption\n1\ta sofa\n", "jsonl": '{"key": 1, "caption": "a sofa"}\n'}
    content["json"] = '[{"key": 1, "caption": "a sofa"}]'
    data = content[kind].encode()
    packed = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }[packing](data)
    path = tmp_path / f"x.{kind}.{packing}"
    path.write_bytes(packed)
    assert read(path, tmp_path) == [{"caption": "a sofa", "key": "1"}]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "shift_jis"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_other_encodings(tmp_path: Path, kind: str, encoding: str) -> None:
    text = "日本の椅子" if encoding == "shift_jis" else "café été"
    content = (
        f'caption,key\n"{text}",1\n' if kind == "csv" else json.dumps({"caption": text}, ensure_ascii=False) + "\n"
    )
    (tmp_path / f"x.{kind}").write_bytes(content.encode(encoding))
    if encoding != "utf-16":  # whose byte order mark says so
        with pytest.raises(AuditError, match=r"pass --encoding|no caption column|not JSON|not CSV"):
            plan_of(tmp_path / f"x.{kind}", tmp_path / "run")
    rows = read(tmp_path / f"x.{kind}", tmp_path, text_format=TextFormat.of(None, False, encoding))
    assert rows[0]["caption"] == text
    if encoding == "utf-16":
        assert read(tmp_path / f"x.{kind}", tmp_path)[0]["caption"] == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((";;", False, None), "--delimiter ';;': give one character"),
        (("\n", False, None), "--delimiter"),
        ((None, False, "klingon"), "--encoding klingon: no such encoding"),
        ((None, False, "base64"), "--encoding base64: no such encoding"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(AuditError) as error:
        TextFormat.of(*flags)
    assert message in str(error.value)


# --- shapes of published tables -----------------------------------------------------------------------------------

URLS = [f"https://example.org/{row}.jpg" for row in range(4)]
TEXTS = ["a sofa", "Shaw Floors <b>'x'</b>", "été, 日本", "a sofa"]
SHAPES: dict[str, dict[str, Any]] = {
    "LAION": {
        "SAMPLE_ID": np.arange(4) + 1e12,
        "URL": URLS,
        "TEXT": TEXTS,
        "HEIGHT": [1, 2, 3, 4],
        "WIDTH": [1, 2, 3, 4],
        "LICENSE": ["?"] * 4,
        "NSFW": ["UNLIKELY"] * 4,
        "similarity": [0.3] * 4,
    },
    "COCO": {"image_id": [9, 9, 25, 25], "id": [1, 2, 3, 4], "caption": TEXTS, "coco_url": URLS},
    "DiffusionDB": {
        "image_name": ["a.png", "b.png", "c.png", "d.png"],
        "prompt": TEXTS,
        "part_id": pa.array([1, 1, 2, 2], pa.uint16()),
        "seed": pa.array([1, 2, 3, 4], pa.uint32()),
        "cfg": pa.array([7.5] * 4, pa.float32()),
        "timestamp": pa.array([0] * 4, pa.timestamp("us", "UTC")),
        "user_name": ["x"] * 4,
    },
    "COYO": {
        "id": [1, 2, 3, 4],
        "url": URLS,
        "text": TEXTS,
        "image_phash": ["8f", "00", "01", "02"],
        "word_count": [2] * 4,
        "num_faces": [0] * 4,
        "clip_similarity_vitb32": [0.3] * 4,
    },
    "img2dataset": {
        "url": URLS,
        "caption": TEXTS,
        "key": ["000000000", "000000001", "000000002", "000000003"],
        "status": ["success", "failed_to_download", "success", "success"],
        "error_message": pa.array([None, "HTTP Error 404", None, None]),
        "width": pa.array([256, None, 256, 256]),
        "exif": ["{}", None, "{}", "{}"],
        "sha256": ["aa", None, "bb", "cc"],
    },
    "CC12M": {"url": URLS, "caption": TEXTS},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_published_tables_are_read_with_no_flag(tmp_path: Path, shape: str) -> None:
    pq.write_table(pa.table(SHAPES[shape]), tmp_path / "x.parquet")
    plan = plan_of(tmp_path / "x.parquet", tmp_path / "run")
    assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == TEXTS
    assert plan.num_unique == 3
    url = {"LAION": "URL", "COCO": "coco_url", "DiffusionDB": None}.get(shape, "url")
    assert url is None or [row[url] for row in rows_of(plan, tmp_path / "run")] == URLS
