"""Pictures without measure: never read, never decoded; a row error or a count that says the limit."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.base.errors import AuditError
from audit.index import Index, IndexConfig, IndexSummary, build_index
from audit.index.items import MOST_BYTES, decode
from audit.index.query import search_image
from audit.index.sources import read_bytes
from tests.audit.index.test_index_tars import picture

pytestmark = pytest.mark.sampling
GIANT = 3 << 30
LIMIT = "pictures of more than 128 MiB are not read"


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """What happens meanwhile keeps Python's memory below so many bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def sparse(path: Path, size: int = GIANT) -> Path:
    """A file of many bytes that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def build(tmp_path: Path, images: Path, most: int = 40 << 20) -> IndexSummary:
    with at_most(most):
        return build_index(IndexConfig(images=(str(images),), output=str(tmp_path / "index"), sscd="testbed"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises so many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_picture_of_gigabytes_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sparse(folder / "huge.jpg")
    sparse(folder / "good.txt")
    (folder / "good.jpg").write_bytes(picture(0))
    done = build(tmp_path, folder)
    assert (done.ok, done.errors) == (1, 1) and done.error_examples[0].startswith("huge.jpg: ")
    assert f"{GIANT:,} bytes: {LIMIT}" in done.error_examples[0]
    assert done.info.left_out == {"texts beside pictures, of more than 16 MiB": 1}
    with pytest.raises(AuditError, match=LIMIT):
        search_image(str(tmp_path / "index"), str(folder / "huge.jpg"))
    index = Index.open(str(tmp_path / "index"))
    sparse(folder / "good.jpg")  # replaced after it was indexed
    with at_most(1 << 20), pytest.raises(AuditError, match=LIMIT):
        index.picture(int(index.ids()[0]))


def test_a_picture_of_gigabytes_in_a_tar(tmp_path: Path) -> None:
    path = sparse(tmp_path / "in" / "0.tar", 0)
    with path.open("r+b") as file:
        for name, size in (("huge.png", GIANT), ("good.txt", GIANT), ("good.png", 0)):
            data = picture(0, "PNG") if not size else b""
            header = tarfile.TarInfo(name)
            header.size = size or len(data)
            file.write(header.tobuf(tarfile.GNU_FORMAT) + data)
            file.seek(size, io.SEEK_CUR)
            file.seek(-file.tell() % 512, io.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    done = build(tmp_path, tmp_path / "in")
    assert (done.ok, done.errors) == (1, 1) and f"{GIANT:,} bytes: {LIMIT}" in done.error_examples[0]
    assert done.info.left_out == {"texts beside pictures, of more than 16 MiB": 1}


@pytest.mark.parametrize("size", [-1, MOST_BYTES + 1, 10**18])
def test_a_locator_that_asks_for_too_much(tmp_path: Path, size: int) -> None:
    sparse(tmp_path / "x.tar")
    with at_most(1 << 20), pytest.raises(AuditError, match=LIMIT):
        read_bytes({"file": str(tmp_path / "x.tar"), "offset": 0, "size": size})


def test_cells_that_name_files(tmp_path: Path) -> None:
    """A cell of `datasets` without bytes names a file: a regular one, of a size that is read, and never a URL."""
    sparse(tmp_path / "huge.jpg")
    (tmp_path / "good.jpg").write_bytes(picture(0))
    paths = ["good.jpg", "huge.jpg", "none.jpg", "."]
    cells: list[dict[str, Any]] = [{"bytes": None, "path": str(tmp_path / name)} for name in paths]
    cells += [{"bytes": None, "path": path} for path in ("/dev/zero", "http://127.0.0.1:9/x.jpg", "zip://a::b")]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": cells}), tmp_path / "in" / "x.parquet")
    done = build(tmp_path, tmp_path / "in")
    assert (done.ok, done.errors) == (1, 6)
    said = "\n".join(done.error_examples)
    assert LIMIT in said and "/dev/zero: not a regular file" in said
    assert said.count("a URL in a cell is not fetched") == 2


def test_large_pictures_of_a_table_are_read_few_at_a_time(tmp_path: Path) -> None:
    """A row group of 400 MB of pictures, which pack to nothing: never held whole, neither now nor when one is shown."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    large = buffer.getvalue() + b"\0" * (2 << 20)
    (tmp_path / "in").mkdir()
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(tmp_path / "in" / "x.parquet", schema, use_dictionary=False, compression="zstd") as writer:
        writer.write_table(pa.table({"image": pa.array([large] * 200, pa.binary())}))
    before = pa.default_memory_pool().max_memory()
    done = build(tmp_path, tmp_path / "in", 120 << 20)
    assert done.ok == 200
    with at_most(40 << 20):
        assert Index.open(str(tmp_path / "index")).picture(150) is not None
    assert pa.default_memory_pool().max_memory() - before < 200 << 20


def test_a_decompression_bomb_is_a_row_error(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (folder / "good.jpg").write_bytes(picture(0))
    done = build(tmp_path, folder)
    assert (done.ok, done.errors) == (1, 1)
    assert "bomb.png: DecompressionBombError" in done.error_examples[0]
    with pytest.raises(Image.DecompressionBombError):
        decode(bomb(30_000, 30_000))
