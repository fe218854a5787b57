"""Wherever pictures are kept, the index is the same: keys, captions, vectors, and the pixels found again."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit import testbed
from audit.base.errors import AuditError
from audit.index import Index, IndexConfig, build_index, tables
from audit.index.items import decode

COUNT = 24
Rows = list[dict]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The testbed's first pictures: key, URL, TEXT, png."""
    table = pq.read_table(testbed.PICTURES, columns=["key", "URL", "TEXT", "image"]).slice(0, COUNT)
    return [{**row, "png": row["image"]["bytes"]} for row in table.to_pylist()]


def build(tmp_path: Path, *images: str, **options: object) -> Index:
    output = str(tmp_path / "index")
    build_index(IndexConfig(images=images, output=output, sscd="testbed", **{"rows_per_part": 10, **options}))
    return Index.open(output)


def as_files(folder: Path, rows: Rows) -> str:
    """As img2dataset writes `files`: 00000/KEY.png, KEY.txt, KEY.json."""
    for i, row in enumerate(rows):
        stem = folder / f"{i // 10:05d}" / f"{i:09d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".png").write_bytes(row["png"])
        stem.with_suffix(".txt").write_text(row["TEXT"])
        stem.with_suffix(".json").write_text(json.dumps({"key": row["key"], "url": row["URL"], "caption": row["TEXT"]}))
    return str(folder)


def as_tars(folder: Path, rows: Rows) -> str:
    """As img2dataset writes `webdataset`: 00000.tar with a metadata parquet and a stats file beside."""
    folder.mkdir()
    for shard in range(0, len(rows), 10):
        with tarfile.open(folder / f"{shard // 10:05d}.tar", "w") as tar:
            for row in rows[shard : shard + 10]:
                facts = json.dumps({"key": row["key"], "url": row["URL"], "caption": row["TEXT"]}).encode()
                members = {".png": row["png"], ".txt": row["TEXT"].encode(), ".json": facts}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(row["key"] + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        metadata = pa.Table.from_pylist(
            [{"url": row["URL"], "caption": row["TEXT"]} for row in rows[shard : shard + 10]]
        )
        pq.write_table(metadata, folder / f"{shard // 10:05d}.parquet")
        (folder / f"{shard // 10:05d}_stats.json").write_text("{}")
    return str(folder)


def as_parquet(folder: Path, rows: Rows) -> str:
    """As img2dataset writes `parquet`: the bytes in a column called `jpg`; row groups that no part fits."""
    folder.mkdir()
    names = {"key": "key", "URL": "url", "TEXT": "caption", "png": "jpg"}
    for number, (start, end) in enumerate([(0, 7), (7, len(rows))]):
        table = pa.Table.from_pylist([{names[k]: row[k] for k in names} for row in rows[start:end]])
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=4)
    return str(folder)


def as_dataset(folder: Path, rows: Rows) -> str:
    """As `datasets` saves it."""
    columns = {name: [row[name] for row in rows] for name in ("key", "URL", "TEXT", "image")}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("write", [as_files, as_tars, as_parquet, as_dataset])
def test_every_layout_gives_the_same_index(write: Callable[[Path, Rows], str], rows: Rows, tmp_path: Path) -> None:
    index = build(tmp_path, write(tmp_path / "pictures", rows))
    facts = index.facts(index.ids()).to_pylist()
    assert [row["key"] for row in facts] == [row["key"] for row in rows]
    assert [row["url"] for row in facts] == [row["URL"] for row in rows]
    assert [row["caption"] for row in facts] == [row["TEXT"] for row in rows]
    originals = [Image.open(io.BytesIO(row["png"])).convert("RGB") for row in rows]
    for id_, original in zip(index.ids().tolist(), originals, strict=True):
        found = index.picture(id_)
        assert found is not None and np.array_equal(np.asarray(found), np.asarray(original))
    described = index.load_descriptor()(originals).numpy()
    np.testing.assert_allclose(index.vectors(index.ids()), described, atol=1e-3)
    again = build_index(
        IndexConfig(
            images=(str(tmp_path / "pictures"),), output=str(tmp_path / "index"), sscd="testbed", rows_per_part=10
        )
    )
    assert again.resumed == again.parts


def test_several_places_at_once_keep_their_ids_apart(rows: Rows, tmp_path: Path) -> None:
    places = [as_files(tmp_path / "a", rows[:12]), as_tars(tmp_path / "b", rows[12:])]
    index = build(tmp_path, *places)
    ids = index.ids()
    assert (ids >> 32).tolist() == [0] * 10 + [1] * 2 + [2] * 10 + [3] * 2
    assert (ids & 0xFFFFFFFF).tolist() == [*range(10), 0, 1, *range(10), 0, 1]
    assert index.facts(ids[::-1])["key"].to_pylist() == [row["key"] for row in rows][::-1]


def test_plain_folder_on_another_file_system(rows: Rows, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for i, row in enumerate(rows):
        fs.pipe_file(f"/crawl/{i % 3}/{i:03d}.png", row["png"])
    fs.pipe_file("/crawl/.hidden.png", b"")
    try:
        build_index(IndexConfig(images=("memory://crawl",), output="memory://made", sscd="testbed", rows_per_part=10))
        index = Index.open("memory://made")
        assert len(index) == COUNT
        assert index.facts(index.ids()[:2])["key"].to_pylist() == ["0/000.png", "0/003.png"]
        assert index.facts(index.ids()[:1])["caption"].to_pylist() == [None]
        picture = index.picture(int(index.ids()[1]))
        assert picture is not None
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(rows[3]["png"])).convert("RGB")))
        assert index.verify(deep=True) == []
    finally:
        fs.rm("/crawl", recursive=True)
        fs.rm("/made", recursive=True)


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_embeddings_already_computed(layout: str, rows: Rows, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((COUNT, 512)).astype(np.float32)
    vectors[5] = 0  # no direction: a row's error
    table = pa.Table.from_pylist([{"url": row["URL"], "caption": row["TEXT"], "key": row["key"]} for row in rows])
    folder = tmp_path / "embeddings"
    if layout == "npy":  # as clip-retrieval lays them out
        (folder / "img_emb").mkdir(parents=True)
        (folder / "metadata").mkdir()
        for number, part in enumerate([slice(0, 9), slice(9, COUNT)]):
            np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors[part].astype(np.float16))
            pq.write_table(
                table.slice(part.start, part.stop - part.start), folder / "metadata" / f"metadata_{number}.parquet"
            )
    else:
        folder.mkdir()
        pq.write_table(table.append_column("embedding", pa.array(list(vectors))), folder / "all.parquet")
    index = build(tmp_path, str(folder))
    kept = [i for i in range(COUNT) if i != 5]
    assert index.facts(index.ids())["key"].to_pylist() == [rows[i]["key"] for i in kept]
    unit = vectors[kept] / np.linalg.norm(vectors[kept], axis=1, keepdims=True)
    np.testing.assert_allclose(index.vectors(index.ids()), unit, atol=1e-3)
    assert index.picture(int(index.ids()[0])) is None
    assert index.info.errors == 1 and index.info.error_examples[0].startswith(rows[5]["key"])


def test_embeddings_of_another_descriptor_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.ones((3, 768), np.float32))
    with pytest.raises(AuditError, match=r"vectors of 768 where copy_descriptor\S* gives 512.*--sscd"):
        build(tmp_path, str(tmp_path / "clip.npy"))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30] = 255  # white top left; orientation 6: seen after a quarter turn clockwise, so white top right
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "p").mkdir()
    Image.fromarray(pixels).save(tmp_path / "p" / "turned.jpg", exif=exif, quality=95)
    index = build(tmp_path, str(tmp_path / "p"), preprocessing="square-64")
    picture = index.picture(int(index.ids()[0]))
    assert picture is not None and picture.size == (40, 60)
    turned = np.rot90(pixels, -1)
    assert np.abs(np.asarray(picture).astype(int) - turned).mean() < 5
    described = index.load_descriptor()([turned, pixels]).numpy() @ index.vectors(index.ids())[0]
    assert described[0] > 0.99 and described[1] < 0.9


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_pictures_of_other_depths_look_the_same() -> None:
    """16 bits, CMYK, palettes: not white, not black, not turned around."""
    ramp = np.add.outer(np.arange(32), np.arange(40)) / 70
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    kinds = [(Image.fromarray((ramp * 65535).astype(np.uint16)), kind) for kind in ("PNG", "TIFF")]
    kinds += [(grey.convert("RGB").convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    kinds += [(grey, kind) for kind in ("JPEG", "GIF", "BMP", "WEBP")]
    kinds += [(grey.convert("LA"), "PNG"), (Image.fromarray((ramp * 255).astype(np.int32)), "TIFF")]
    for image, kind in kinds:
        found = np.asarray(decode(encoded(image, kind))).astype(int)
        assert np.abs(found - np.asarray(grey)[..., None]).mean() < 3, (image.mode, kind)
    for values in (ramp.astype(np.float32), (ramp * 65535).astype(np.int32)):  # nobody has said what is white
        with pytest.raises(ValueError, match="no picture of 8 or 16 bits"):
            decode(encoded(Image.fromarray(values), "TIFF"))


def test_no_picture_runs_a_program() -> None:
    with pytest.raises(Image.UnidentifiedImageError):  # Pillow gives it to Ghostscript
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_parts_without_pictures_among_others(rows: Rows, tmp_path: Path) -> None:
    """A part nothing was written into has no types, or not even the columns; keys that are floats are whole numbers."""
    folder = tmp_path / "p"
    folder.mkdir()
    pq.write_table(pa.table({"image": pa.nulls(0), "key": pa.nulls(0)}), folder / "0.parquet")
    pq.write_table(pa.table({"image": pa.nulls(1), "key": [7.0]}), folder / "1.parquet")
    pq.write_table(pa.table({"image": [rows[0]["png"]], "key": [1e12]}), folder / "2.PARQUET")
    pq.write_table(pa.table({"other": pa.nulls(0)}), folder / "3.parquet")
    index = build(tmp_path, str(folder))
    assert index.facts(index.ids())["key"].to_pylist() == ["1000000000000"]
    assert index.info.errors == 1 and index.info.error_examples == ["7: no picture in this row"]


def test_undecodable_pictures_are_counted_and_listed(rows: Rows, tmp_path: Path) -> None:
    folder = Path(as_files(tmp_path / "p", rows))
    (folder / "00000" / "page.jpg").write_text("<html>404</html>")
    (folder / "00001" / "cut.png").write_bytes(rows[0]["png"][: len(rows[0]["png"]) // 2])
    (folder / "00002" / "empty.webp").write_bytes(b"")
    config = IndexConfig(images=(str(folder),), output=str(tmp_path / "i"), sscd="testbed", rows_per_part=7)
    summary = build_index(config)
    assert (summary.rows, summary.ok, summary.errors) == (COUNT + 3, COUNT, 3)
    listed = " ".join(summary.error_examples)
    assert all(name in listed for name in ("page.jpg", "cut.png", "empty.webp"))
    index = Index.open(config.output)
    ids, cosines = index.search(index.vectors(index.ids()), len(index) + 3)
    assert (ids[:, 0] == index.ids()).all() and (ids[:, -3:] == -1).all() and np.isneginf(cosines[:, -3:]).all()


def test_a_part_without_one_readable_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / "p" / f"{i}.jpg").write_text("not a picture")
    with pytest.raises(AuditError, match=r"part 0 .*not one picture could be read.*cannot identify"):
        build(tmp_path, str(tmp_path / "p"))


def test_a_cut_tar_keeps_its_whole_pictures(rows: Rows, tmp_path: Path) -> None:
    folder = Path(as_tars(tmp_path / "p", rows[:10]))
    tar = folder / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    index = build(tmp_path, str(folder))
    keys = index.facts(index.ids())["key"].to_pylist()
    assert 2 <= len(keys) < 10 and keys == [row["key"] for row in rows[: len(keys)]]
    assert index.info.errors >= 1 and "00000.tar" in " ".join(index.info.error_examples)


def test_what_holds_no_pictures_is_said_in_one_line(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"TEXT": ["a"]}), tmp_path / "captions.parquet")
    np.save(tmp_path / "flat.npy", np.ones(5))
    cases = {
        "gone": "gone: no such file or folder",
        "empty": "empty: holds no pictures",
        "cut.parquet": r"cut\.parquet: the Parquet file is cut short",
        "captions.parquet": "no column of encoded pictures or embeddings among TEXT: pass --image-col",
        "flat.npy": r"flat\.npy: embeddings are float \[rows, dim\]",
    }
    for name, message in cases.items():
        with pytest.raises(AuditError, match=message) as caught:
            build(tmp_path, str(tmp_path / name))
        assert "\n" not in str(caught.value)
    parquet = as_parquet(tmp_path / "parquet", rows)
    with pytest.raises(AuditError, match=r"has no column 'alt'; it has key, url, caption, jpg: pass --caption-col"):
        build(tmp_path, parquet, caption_col="alt")
    assert not (tmp_path / "index").exists()


def test_pictures_that_went_away_are_named(rows: Rows, tmp_path: Path) -> None:
    folder = Path(as_files(tmp_path / "p", rows))
    index = build(tmp_path, str(folder))
    gone = sorted(folder.rglob("*.png"))[0]
    gone.unlink()
    with pytest.raises(AuditError, match=gone.name):
        index.picture(int(index.ids()[0]))


def test_row_groups_are_kept_as_far_as_memory_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are looked at here and there: a row group is read once where all fit, and never more are held."""
    cells = [bytes([number]) * 1000 for number in range(40)]
    pq.write_table(
        pa.table({"image": cells}), tmp_path / "x.parquet", row_group_size=4, compression="none", use_dictionary=False
    )
    read = list[int]()
    plain = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
        read.append(number)
        return plain(file, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(tables, "_kept", tables._Kept())
    places = [row for turn in range(3) for row in range(turn, 40, 3)]

    def look() -> list[bytes]:
        return [tables.read_cell({"file": str(tmp_path / "x.parquet"), "row": n, "column": "image"}) for n in places]

    assert look() == [cells[n] for n in places]
    assert sorted(read) == list(range(10))
    monkeypatch.setattr(tables, "_KEPT_BYTES", 20_000)  # some groups of ten
    monkeypatch.setattr(tables, "_kept", tables._Kept())
    assert look() == [cells[n] for n in places]
    held = sum(column.nbytes for column in tables._kept.columns.values())
    assert 0 < held == tables._kept.size <= 20_000
