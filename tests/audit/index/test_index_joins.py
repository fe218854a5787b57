"""Whose picture is whose: which columns of a table are read, what counts as a key, and texts beside pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.base.errors import AuditError
from audit.index import Index, IndexConfig, build_index
from audit.index.items import decode
from tests.audit.index.test_index_tars import picture, tar_of
from tests.command import be_audit


def build(tmp_path: Path, *images: Path, **options: object) -> Index:
    output = str(tmp_path / "index")
    build_index(IndexConfig(images=tuple(map(str, images)), output=output, **{"sscd": "testbed", **options}))
    return Index.open(output)


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    pq.write_table(pa.table({"image": [picture(at) for at in range(count)], **columns}), path)
    return path


def test_a_made_up_key_is_nobodys(tmp_path: Path) -> None:
    index = build(tmp_path, write(tmp_path / "in.parquet", caption=["a cat", "a dog"]))
    assert index.facts(index.ids())["key"].to_pylist() == ["0", "1"]  # places, for people
    for column in ("key", "number"):
        assert index.own([(column, ["0", "1"])]) == [None, None]
    assert index.own([("key", ["0", "1"]), ("caption", ["a dog", "a cat"])]) == [1, 0]


def test_a_row_number_is_joined_with_row_numbers_alone(tmp_path: Path) -> None:
    index = build(tmp_path, write(tmp_path / "in.parquet", id=[7, 8], caption=["a cat", "a dog"]))
    assert index.own([("key", ["7", "8"])]) == [None, None]
    assert index.own([("number", ["8", "7"])]) == [1, 0]


def test_a_row_without_its_key_does_not_take_anothers(tmp_path: Path) -> None:
    keys = ["2", None, None]  # the third row's place is 2
    index = build(tmp_path, write(tmp_path / "in.parquet", key=keys))
    assert index.own([("key", ["2"])]) == [0]
    index = build(tmp_path / "turned", write(tmp_path / "turned.parquet", key=[None, "0"]))
    assert index.own([("key", ["0"])]) == [1]


def test_what_several_pictures_are_called_is_none_of_them(tmp_path: Path) -> None:
    for at in range(2):
        tar_of(tmp_path / "in" / f"{at}.tar", [("000.jpg", picture(at)), ("000.txt", f"text {at}".encode())])
    index = build(tmp_path, tmp_path / "in")
    second = int(index.ids()[1])
    assert index.own([("key", ["000", "000"]), ("caption", ["text 1", "of no picture"])]) == [second, None]


def test_pictures_of_one_name_in_a_tar_have_the_texts_in_their_order(tmp_path: Path) -> None:
    members = [("0.jpg", picture(0)), ("0.txt", b"first"), ("0.jpg", picture(1)), ("0.txt", b"second")]
    tar_of(tmp_path / "in" / "0.tar", members)
    index = build(tmp_path, tmp_path / "in")
    assert index.facts(index.ids())["caption"].to_pylist() == ["first", "second"]
    tar_of(tmp_path / "few" / "0.tar", [*members[:3], ("1.jpg", picture(2)), ("1.txt", b"its own")])
    index = build(tmp_path / "b", tmp_path / "few")
    assert index.facts(index.ids())["caption"].to_pylist() == [None, None, "its own"]
    assert index.info.left_out == {"texts of which a tar has another number than pictures of their name": 2}


@pytest.mark.parametrize("columns, taken", [
    ({"caption": ["a caption"], "text": ["its OCR"]}, "a caption"),
    ({"TEXT": pa.nulls(1, pa.string()), "caption": ["a caption"]}, "a caption"),
    ({"Text": ["any case"]}, "any case"),
    ({"title": ["a title"]}, "a title"),
    ({"TEXT": [b"bytes"]}, "bytes"),
])  # fmt: skip
def test_captions_are_read_from_where_a_scan_reads_them(tmp_path: Path, columns: dict, taken: str) -> None:
    write(tmp_path / "in.parquet", **columns, key=[b"k1"], url=[b"http://x"])
    index = build(tmp_path, tmp_path / "in.parquet")
    row = index.facts(index.ids()).to_pylist()[0]
    assert (row["caption"], row["key"], row["url"]) == (taken, "k1", "http://x")


def test_embeddings_have_the_metadata_of_their_own_folder(tmp_path: Path) -> None:
    for name in "xy":
        for part in ("img_emb", "metadata"):
            (tmp_path / "in" / name / part).mkdir(parents=True)
        np.save(tmp_path / "in" / name / "img_emb" / "img_emb_0.npy", np.eye(2, 512, dtype=np.float32))
        table = pa.table({"key": [f"{name}0", f"{name}1"]})
        pq.write_table(table, tmp_path / "in" / name / "metadata" / "metadata_0.parquet")
    index = build(tmp_path, tmp_path / "in")
    assert index.facts(index.ids())["key"].to_pylist() == ["x0", "x1", "y0", "y1"]
    pq.write_table(table, tmp_path / "in" / "x" / "metadata" / "again_00.parquet")
    with pytest.raises(AuditError, match=r"img_emb_0\.npy: its metadata may be .*again_00\.parquet or .*metadata_0"):
        build(tmp_path / "b", tmp_path / "in")


def test_embeddings_need_the_name_of_what_made_them(tmp_path: Path) -> None:
    np.save(tmp_path / "img_emb_0.npy", np.eye(2, 512, dtype=np.float32))
    done = be_audit("index", "build", tmp_path / "img_emb_0.npy", "-o", tmp_path / "index")
    assert done.code == 2 and "holds embeddings, and only you know which descriptor made them: name it" in done.err
    assert not (tmp_path / "index").exists()


def test_pictures_that_a_shell_named_have_the_texts_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for at in range(3):
        (folder / f"{at}.jpg").write_bytes(picture(at))
        (folder / f"{at}.txt").write_text(f"text {at}")
    index = build(tmp_path, *sorted(folder.glob("[01].jpg")))
    rows = index.facts(index.ids()).to_pylist()
    assert [(row["key"], row["caption"]) for row in rows] == [("0.jpg", "text 0"), ("1.jpg", "text 1")]
    assert index.info.parts == 1


def test_json_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for at in range(2):
        (folder / f"{at}.jpg").write_bytes(picture(at))
        (folder / f"{at}.json").write_bytes('{"caption": "café"}'.encode(("utf-8", "latin-1")[at]))
    index = build(tmp_path, folder)
    assert index.facts(index.ids())["caption"].to_pylist() == ["café", None]
    assert index.info.left_out == {"JSON beside pictures that cannot be read": 1}


def test_eight_bits_in_a_file_of_sixteen(tmp_path: Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "x.png")
    found = decode((tmp_path / "x.png").read_bytes())
    assert np.asarray(found)[..., 0].ravel().tolist() == list(range(256))


def test_pictures_beside_embeddings_are_seen(tmp_path: Path) -> None:
    np.save(tmp_path / "img_emb_0.npy", np.eye(2, 512, dtype=np.float32))
    index = build(tmp_path, tmp_path / "img_emb_0.npy", write(tmp_path / "in.parquet", key=["a", "b"]))
    assert index.ids().tolist() == [0, 1, 1 << 32, (1 << 32) + 1]
    assert index.seen().tolist() == [1 << 32, (1 << 32) + 1] and index.info.blind == [0]
