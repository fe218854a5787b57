"""Training pictures on their way into the index: what a source gives, and what is known of a picture beside it."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
import numpy as np
import xxhash
from PIL import Image, ImageOps

from audit.base.identity import CAPTIONS, TITLES, URLS, id_text

MOST_BYTES = 128 << 20  # of an encoded picture: nothing larger is read; one of 179 million pixels as JPEG has a third
MOST_TEXT = 16 << 20  # of a text beside a picture
_MANY_PIXELS = 1 << 24  # pictures above this are decoded one at a time: eight of the largest would fill the memory
_one_at_a_time = threading.Lock()
PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
Image.init()
_DECODED = tuple(name for name in _FORMATS if name in Image.OPEN)
"""Kinds of pictures that are decoded, whatever they are called: Pillow's others run programs (EPS: Ghostscript)."""


@dataclass
class Item:
    """One picture on its way into the index.

    Attributes:
        key_from: what the key is: one of its own (KEY), a bare row number of the table (NUMBER), or made up here from
            its place (PLACE): no caption has that by rights.
        locator: where its pixels are, for `read_bytes`; {} when there are none.
        data: the encoded picture where it came with the row, else None and the locator is read.
        error: why there is no picture.
        left_out: why this is no row of the index at all: it is counted by that reason, and goes.
    """

    key: str
    url: str | None = None
    caption: str | None = None
    locator: dict[str, Any] | None = None
    data: bytes | None = None
    error: str | None = None
    left_out: str | None = None
    key_from: str = "key"


KEY, NUMBER, PLACE = "key", "number", "place"
EMBEDDINGS = "embeddings"  # the kind of sources that have vectors and no pixels


@dataclass(frozen=True)
class Slice:
    """One unit of work: `count` rows of a source from `start` (of one file, where the source has files).

    `count` 0: nobody has counted them (a tar); progress then counts parts.
    """

    start: int
    count: int
    file: str = ""


@dataclass(frozen=True)
class Columns:
    """Columns named by the user; None: found by name and type."""

    image: str | None = None
    url: str | None = None
    caption: str | None = None
    key: str | None = None


class Source(Protocol):
    """What the build needs of a source."""

    kind: str

    def facts(self) -> dict[str, Any]:
        """What the fingerprint holds of it: files, rows, bytes, a digest of the listing."""

    def parts(self, rows: int) -> list[Slice]:
        """Units of about `rows` rows, in a fixed order."""

    def items(self, part: Slice) -> Iterator[Item]:
        """The rows of a part, in order."""

    def columns(self) -> str:
        """Where a table's captions, URLs and keys are read from, for people; "" for what is no table."""

    def mark(self, part: Slice) -> str:
        """What tells that the files of a part are still the ones it was made from; "" where nothing does."""

    def vectors(self, part: Slice) -> np.ndarray | None:
        """Embeddings of a part's rows, float [rows, dim], where they are already computed; else None."""


BROKEN_JSON = "JSON beside pictures that cannot be read"


def described(item: Item, text: bytes | None, facts: bytes | None, left: Counter[str]) -> Item:
    """Fill url, caption and key from the files beside a picture; JSON that does not parse is counted in `left`."""
    if facts is not None:
        try:
            content = json.loads(facts)
        except (ValueError, RecursionError):  # no reason to lose the picture
            content = None
            left[BROKEN_JSON] += 1
        if isinstance(content, dict):
            by_name = {str(name).lower(): value for name, value in content.items()}
            item.url = first_text(by_name, URLS)
            item.caption = first_text(by_name, map(str.lower, (*CAPTIONS, *TITLES)))
            # img2dataset's own `key` is a number, which may well be another row's key
            key = item.url if "uid" in by_name else first_text(by_name, ("key",))
            item.key = first_text(by_name, ("uid",)) or key or item.key
    if text is not None:
        encoding = "utf-16" if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        item.caption = text.decode(encoding, "replace").removesuffix("\n").removesuffix("\r")  # the file's, not its own
    return item


def first_text(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds something, as text."""
    return next((found for name in names if (found := id_text(row.get(name)))), None)


def slices(total: int, rows: int, file: str = "") -> list[Slice]:
    """Cut `total` rows into units of `rows`."""
    return [Slice(start, min(rows, total - start), file) for start in range(0, total, rows)]


def listing_facts(files: dict[str, int]) -> dict[str, Any]:
    """Count, bytes and a digest of a listing; a picture renamed, added, removed or of another size changes it."""
    digest = hashlib.sha256()
    for path, size in files.items():
        digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))  # names need not be UTF-8
    return {"files": len(files), "bytes": sum(files.values()), "listing": digest.hexdigest()[:16]}


def content_mark(data: bytes) -> str:
    """What is kept of an encoded picture, to know it again: xxh3, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def files_mark(paths: Iterable[str]) -> str:
    """A digest of names, sizes and times of change (of object stores: ETags) of files; "" where one tells neither."""
    digest = xxhash.xxh3_128()
    for path in paths:
        stamp = _stamp(path)
        if not stamp:
            return ""
        digest.update(f"{path}\0{stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamp(path: str) -> str:
    if path.startswith("http"):
        return ""  # a request a file
    try:
        if "://" not in path:
            made = os.stat(path)
            return f"{made.st_size} {made.st_mtime_ns}"
        fs, name = fsspec.core.url_to_fs(path)
        found = fs.info(name)  # of the listing that the source was made of
    except OSError:  # its row will say so
        return "gone"
    tells = (found.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime"))
    return next((f"{found.get('size')} {value}" for value in tells if value), "")


class TooLarge(OSError):
    """A picture of more bytes than are read: known from its size alone."""


def check_size(size: int) -> None:
    """Raise TooLarge for the size of a picture that is not read."""
    if not 0 <= size <= MOST_BYTES:
        raise TooLarge(f"{size:,} bytes: pictures of more than {MOST_BYTES >> 20} MiB are not read")


def read_file(path: str) -> bytes:
    """A file whole, once its size is known. Raises TooLarge, OSError; ValueError for what is no regular file."""
    fs, name = fsspec.core.url_to_fs(path)
    facts = fs.info(name)
    if facts["type"] != "file":
        raise ValueError(f"{path}: not a regular file")
    size = MOST_BYTES if facts["size"] is None else facts["size"]
    check_size(size)
    with fs.open(name, "rb") as file:
        return bytes(file.read(size))


def decode(data: bytes) -> Image.Image:
    """An encoded picture as RGB, turned as its EXIF says.

    Raises whatever the decoder does on broken input; above Pillow's 179 million pixels DecompressionBombError, from the
    header alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from 89 million on; the limit is its double
        opened = Image.open(io.BytesIO(data), formats=_DECODED)
    with opened, _one_at_a_time if opened.width * opened.height > _MANY_PIXELS else nullcontext():
        return _eight_bits(ImageOps.exif_transpose(opened)).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits as one of 8; Pillow cuts what is above 255, which leaves white.

    Raises ValueError for numbers of which nobody has said what is white.
    """
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint16)
        if pixels.max() > 255:  # else 8 bits in a file of 16, as scientific programs write them
            pixels >>= 8
        return Image.fromarray(pixels.astype(np.uint8))
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and (image.mode == "I" or pixels.max() > 1) and pixels.max() <= 255):
            raise ValueError(f"pixels from {pixels.min():g} to {pixels.max():g}: no picture of 8 or 16 bits")
    return image
