"""An index is of what its files hold now: changed files are described again, and no picture is taken for another."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.base.errors import AuditError
from audit.index import Index, IndexConfig, IndexSummary, build_index
from tests.audit.index.test_index_tars import tar_of
from tests.command import be_audit

SIZE = 32 * 32 * 3 + 54  # bytes of every picture here: BMP is not compressed


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 255, (32, 32, 3), np.uint8)
    pixels[:8] = shade
    Image.fromarray(pixels).save(buffer, "BMP")
    assert len(buffer.getvalue()) == SIZE
    return buffer.getvalue()


def shade(image: Image.Image | None) -> int:
    assert image is not None
    return int(np.asarray(image)[0, 0, 0])


def as_folder(path: Path, shades: list[int]) -> None:
    path.mkdir(exist_ok=True)
    for at, each in enumerate(shades):
        (path / f"{at}.bmp").write_bytes(picture(each))


def as_tar(path: Path, shades: list[int]) -> None:
    tar_of(path / "0.tar", [(f"{at}.bmp", picture(each)) for at, each in enumerate(shades)])


def as_parquet(path: Path, shades: list[int]) -> None:
    path.mkdir(exist_ok=True)
    table = pa.table({"image": [picture(each) for each in shades], "key": [str(at) for at in range(len(shades))]})
    pq.write_table(table, path / "0.parquet", compression="none", use_dictionary=False, write_statistics=False)


def build(tmp_path: Path, images: Path, **options: object) -> tuple[IndexSummary, Index]:
    output = str(tmp_path / "index")
    config = {"sscd": "testbed", "rows_per_part": 2, **options}
    return build_index(IndexConfig(images=(str(images),), output=output, **config)), Index.open(output)


WRITERS = [as_folder, as_tar, as_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_other_pictures_of_the_same_names_and_sizes_are_described_again(
    write: Callable[[Path, list[int]], None], tmp_path: Path
) -> None:
    write(tmp_path / "in", [10, 20, 30, 40])
    first, before = build(tmp_path, tmp_path / "in")
    same, _ = build(tmp_path, tmp_path / "in")
    assert (first.again, same.again, same.resumed) == (0, 0, same.parts)
    write(tmp_path / "in", [40, 30, 20, 10])
    done, index = build(tmp_path, tmp_path / "in")
    assert done.again > 0 and done.resumed + done.again == done.parts
    assert [shade(index.picture(id)) for id in index.ids().tolist()] == [40, 30, 20, 10]
    expected = index.load_descriptor()([Image.open(io.BytesIO(picture(each))) for each in (40, 30, 20, 10)]).numpy()
    np.testing.assert_allclose(index.vectors(index.ids()), expected, atol=2e-3)
    assert index.contents != before.contents  # what was matched with it is matched again


@pytest.mark.parametrize("write", WRITERS)
def test_a_picture_that_lies_in_the_place_of_another_is_not_taken_for_it(
    write: Callable[[Path, list[int]], None], tmp_path: Path
) -> None:
    write(tmp_path / "in", [10, 20])
    _, index = build(tmp_path, tmp_path / "in")
    write(tmp_path / "in", [20, 10])
    opened = Index.open(index.folder.url)  # another process, which remembers nothing
    with pytest.raises(AuditError, match=r"another picture lies there than when the index was made"):
        opened.picture(int(opened.ids()[0]))


def test_a_part_that_is_no_arrow_file_any_more_is_described_again(tmp_path: Path) -> None:
    as_folder(tmp_path / "in", [10, 20, 30, 40])
    _, before = build(tmp_path, tmp_path / "in")
    part = next((tmp_path / "index" / "parts").rglob("00001.arrow"))
    part.write_bytes(b"\0" * part.stat().st_size)
    done, index = build(tmp_path, tmp_path / "in")
    assert (done.again, done.resumed) == (1, 1) and index.contents == before.contents
    assert index.verify(deep=True) == []


def test_texts_that_came_or_changed_are_read(tmp_path: Path) -> None:
    as_folder(tmp_path / "in", [10, 20, 30, 40])
    (tmp_path / "in" / "0.txt").write_text("old")
    _, before = build(tmp_path, tmp_path / "in")
    (tmp_path / "in" / "0.txt").write_text("new")
    (tmp_path / "in" / "3.json").write_text(json.dumps({"caption": "there now"}))
    done, index = build(tmp_path, tmp_path / "in")
    assert (done.again, done.parts) == (2, 2)
    assert index.facts(index.ids())["caption"].to_pylist() == ["new", None, None, "there now"]
    assert index.contents != before.contents


def test_embeddings_and_their_metadata_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    vectors = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    np.save(folder / "img_emb_0.npy", vectors)
    pq.write_table(pa.table({"key": list("abcd")}), folder / "metadata_0.parquet")
    _, before = build(tmp_path, folder)
    np.save(folder / "img_emb_0.npy", vectors[::-1].copy())
    done, index = build(tmp_path, folder)
    assert done.again == 2 and index.contents != before.contents
    np.testing.assert_allclose(
        index.vectors(index.ids()) @ (vectors[3] / np.linalg.norm(vectors[3])), [1, *[0] * 3], atol=0.2
    )
    pq.write_table(pa.table({"key": list("dcba")}), folder / "metadata_0.parquet")
    done, index = build(tmp_path, folder)
    assert done.again == 2 and index.facts(index.ids())["key"].to_pylist() == list("dcba")


def test_pictures_that_can_be_read_again_come_into_the_index(tmp_path: Path) -> None:
    as_folder(tmp_path / "in", [10, 20, 30, 40])
    table = pa.table({"image": [{"bytes": None, "path": str(tmp_path / f"in/{at}.bmp")} for at in range(4)]})
    pq.write_table(table, tmp_path / "paths.parquet")  # the table does not change, what it points at does
    (tmp_path / "in" / "2.bmp").rename(tmp_path / "away")
    done, before = build(tmp_path, tmp_path / "paths.parquet")
    assert (done.ok, done.errors) == (3, 1)
    (tmp_path / "away").rename(tmp_path / "in" / "2.bmp")
    done, index = build(tmp_path, tmp_path / "paths.parquet")
    assert (done.ok, done.errors, done.again) == (4, 0, 1)
    assert shade(index.picture(int(index.ids()[2]))) == 30
    assert index.contents != before.contents
    same, _ = build(tmp_path, tmp_path / "paths.parquet")
    assert (same.again, same.resumed) == (0, 2)


def test_a_copy_elsewhere_and_a_touch_change_nothing_but_time(tmp_path: Path) -> None:
    as_folder(tmp_path / "in", [10, 20, 30, 40])
    _, before = build(tmp_path, tmp_path / "in")
    os.utime(tmp_path / "in" / "0.bmp", (1, 1))
    done, index = build(tmp_path, tmp_path / "in")
    assert done.again == 1 and index.contents == before.contents  # a confirm goes on with it
    shutil.rmtree(tmp_path / "index")
    _, other = build(tmp_path, tmp_path / "in")
    assert other.contents == before.contents


def test_it_is_said_what_was_described_again_and_what_columns_were_read(tmp_path: Path) -> None:
    as_parquet(tmp_path / "in", [10, 20, 30, 40])
    arguments = ("index", "build", tmp_path / "in", "-o", tmp_path / "index", "--sscd", "testbed")
    assert "Columns: captions from none, URLs from none, keys from key." in be_audit(*arguments).out
    as_parquet(tmp_path / "in", [10, 20, 30, 41])
    assert "1 of 1 parts were described again: their pictures have changed" in be_audit(*arguments).out
