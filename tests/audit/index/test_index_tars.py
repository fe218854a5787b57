"""Tars as webdataset reads them, and what is left out of an index, counted by reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from audit.index import Index, IndexConfig, IndexSummary, build_index


def picture(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 40, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def build(tmp_path: Path, images: Path) -> tuple[IndexSummary, list[tuple[str, str | None]]]:
    done = build_index(IndexConfig(images=(str(images),), output=str(tmp_path / "index"), sscd="testbed"))
    index = Index.open(str(tmp_path / "index"))
    facts = index.facts(index.ids()).to_pylist()
    for id, row in zip(index.ids().tolist(), facts, strict=True):  # the pixels are found again, by offset
        found = index.picture(id)
        assert found is not None and found.size == (40, 32), row
    return done, [(row["key"], row["caption"]) for row in facts]


def test_dots_in_names(tmp_path: Path) -> None:
    members = []
    for at in range(6):
        members += [(f"a/shop.v{at}.photo.jpg", picture(at)), (f"a/shop.v{at}.photo.txt", f"caption {at}".encode())]
    tar_of(tmp_path / "in" / "00000.tar", members)
    _, rows = build(tmp_path, tmp_path / "in")
    assert rows == [(f"a/shop.v{at}.photo", f"caption {at}") for at in range(6)]


def test_members_in_any_order(tmp_path: Path) -> None:
    texts = [(f"{at}.txt", f"caption {at}".encode()) for at in range(6)]
    tar_of(tmp_path / "in" / "00000.tar", [(f"{at}.jpg", picture(at)) for at in range(6)] + texts[::-1])
    _, rows = build(tmp_path, tmp_path / "in")
    assert rows == [(str(at), f"caption {at}") for at in range(6)]


def test_kinds_of_pictures_and_of_captions(tmp_path: Path) -> None:
    members = [
        ("a.jpeg", picture(0)),
        ("a.caption", b"of a .caption"),
        ("b.JPG", picture(1)),
        ("b.json", json.dumps({"caption": "of a .json", "url": "u"}).encode()),
        ("c.webp", picture(2, "WEBP")),
        ("c.txt", b"of a .txt"),
        ("d.PNG", picture(3, "PNG")),
        ("d.txt", b"of d"),
        ("d.crop.png", picture(4, "PNG")),  # of webdataset's sample d
        ("e.tiff", picture(5, "TIFF")),
    ]
    tar_of(tmp_path / "in" / "00000.tar", members)
    done, rows = build(tmp_path, tmp_path / "in")
    assert rows == [
        ("a", "of a .caption"),
        ("b", "of a .json"),
        ("c", "of a .txt"),
        ("d", "of d"),
        ("d.crop", "of d"),
        ("e", None),
    ]
    assert done.info.left_out == {}


def test_what_gave_no_picture_is_counted_by_reason(tmp_path: Path) -> None:
    members = [
        ("._0.jpg", b"\0\5\x16\7 of a Mac"),
        ("0.jpg", picture(0)),
        ("0.cls", b"7"),
        ("0.txt", b"a sofa"),
        ("lost.txt", b"a text alone"),
        ("lost.json", b"{}"),
    ]
    folder = tmp_path / "in"
    tar_of(folder / "00000.tar", members)
    tar_of(folder / "00001.tar", [("1.jpg", picture(1)), ("1.npy", b"x")])
    (folder / "old.tar.gz").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    status = ["success", "failed_to_download", "success"]
    table = {"url": ["u", "v", "w"], "status": status, "error_message": [None, "HTTP Error 404", None]}
    pq.write_table(pa.table(table), folder / "00000.parquet")
    done, rows = build(tmp_path, folder)
    assert rows == [("0", "a sofa"), ("1", None)] and done.errors == 0
    assert done.info.left_out == {
        "hidden in tars": 1,
        "of other kinds in tars": 2,
        "texts without a picture in tars": 2,
        "compressed tars: unpack them": 1,
        "hidden": 1,
        "of other kinds": 1,
        "dead URLs": 1,
    }
    again, _ = build(tmp_path, folder)
    assert again.resumed == 2 and again.info.left_out == done.info.left_out


def test_our_own_pictures_beside_the_training_pictures_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "run" / "report" / "pictures").mkdir(parents=True)
    (folder / "0.png").write_bytes(picture(0, "PNG"))
    (folder / "run" / "report" / "pictures" / "1.png").write_bytes(picture(1, "PNG"))
    (folder / "run" / "report" / "report.json").write_text(
        json.dumps(dict.fromkeys(("format", "made", "digest", "run"), 1))
    )
    done, rows = build(tmp_path, folder)
    assert rows == [("0.png", None)] and done.info.left_out == {"of be-audit's own": 2}


def test_json_nested_beyond_measure_beside_a_picture(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    tar_of(tmp_path / "in" / "0.tar", [("a.jpg", picture(0)), ("a.json", deep), ("a.txt", b"a sofa")])
    assert build(tmp_path, tmp_path / "in")[1] == [("a", "a sofa")]


def test_members_that_point_elsewhere(tmp_path: Path) -> None:
    """`..`, absolute names and links in a tar: names are keys, and nothing is written or read outside."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(9))
    path = tar_of(tmp_path / "in" / "0.tar", [("../../up.jpg", picture(0)), (f"{tmp_path}/abs.jpg", picture(1))])
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    before = {each for each in tmp_path.rglob("*") if "index" not in each.parts}
    done, rows = build(tmp_path, tmp_path / "in")
    assert [key for key, _ in rows] == ["../../up", f"{tmp_path}/abs".lstrip("/")]
    assert done.info.left_out == {"links in tars": 3}
    assert before == {each for each in tmp_path.rglob("*") if "index" not in each.parts}


def test_tars_one_behind_the_other_are_no_whole_tar(tmp_path: Path) -> None:
    """What `cat a.tar b.tar` makes: tarfile stops at the first end mark, and says nothing of what is behind it."""
    parts = [tar_of(tmp_path / name, [(f"{name}.jpg", picture(at))]).read_bytes() for at, name in enumerate("ab")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(b"".join(parts))
    done, rows = build(tmp_path, tmp_path / "in")
    assert rows == [("a", None)] and done.errors == 1
    assert "tars one behind the other are read as the first alone" in done.error_examples[0]


def test_names_as_tar_and_folders_have_them(tmp_path: Path) -> None:
    """`tar c .` writes ./KEY; extensions in any case; names that are not UTF-8."""
    folder = tmp_path / "in"
    tar_of(folder / "0.TAR", [("./0.jpg", picture(0)), ("./0.TXT", b"of a tar"), ("caf\udce9.jpg", picture(1))])
    for name, data in (
        ("A.JPG", picture(2)),
        ("A.TXT", b"of a folder"),
        ("b.crop.jfif", picture(3)),
        ("b.txt", b"of b"),
    ):
        (folder / name).write_bytes(data)
    (folder / "caf\udce9.jpg").write_bytes(picture(4))
    done, rows = build(tmp_path, folder)
    assert rows == [
        ("0", "of a tar"),
        ("caf?", None),
        ("A.JPG", "of a folder"),
        ("b.crop.jfif", "of b"),
        ("caf?.jpg", None),
    ]
    assert done.info.left_out == {}


def test_texts_as_editors_save_them(tmp_path: Path) -> None:
    """A byte order mark and the line end of the file are no part of a caption; ids and gaps as everywhere else."""
    facts = {
        "0.json": b'{"uid": 1000000000000.0, "caption": NaN}',
        "1.json": b'{"caption": "a \\ud83d sofa", "uid": NaN}',
    }
    texts = {"2.txt": b"\xef\xbb\xbfa sofa\r\n", "3.txt": "été".encode("utf-16"), "4.txt": b"two\n\n"}
    pictures = [(f"{at}.jpg", picture(at)) for at in range(5)]
    tar_of(tmp_path / "in" / "0.tar", [*pictures, *facts.items(), *texts.items()])
    _, rows = build(tmp_path, tmp_path / "in")
    expected = [("1000000000000", None), ("1", "a ? sofa"), ("2", "a sofa"), ("3", "été"), ("4", "two\n")]
    assert rows == expected


def test_a_number_of_img2dataset_is_no_key_of_ours(tmp_path: Path) -> None:
    """Rows of a list some of which have no key: theirs is the URL, not the number that the download gave them."""
    facts = [{"uid": "000000001", "key": "000000000", "url": "u"}, {"uid": None, "key": "000000001", "url": "v"}]
    members = [(f"{each['key']}.json", json.dumps(each).encode()) for each in facts]
    tar_of(tmp_path / "in" / "0.tar", [(f"{each['key']}.jpg", picture(at)) for at, each in enumerate(facts)] + members)
    assert [key for key, _ in build(tmp_path, tmp_path / "in")[1]] == ["000000001", "v"]
