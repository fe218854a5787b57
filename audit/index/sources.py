"""Where training pictures come from: folders, webdataset tars, parquet, `datasets` sets, embeddings already computed.

A source lists its parts (units of work, in a fixed order), reads a part's rows, and says for each row where its pixels
are, so that `read_bytes` finds them again later.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
import numpy as np
from PIL import Image, ImageOps

from audit.errors import AuditError
from audit.storage import list_tree

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
URL_COLUMNS = ("url", "image_url", "img_url", "link")
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions", "alt_text", "title")
KEY_COLUMNS = ("key", "id", "image_id", "sample_id", "uid", "file_name", "filename", "hash", "md5", "sha256")


@dataclass
class Item:
    """One picture on its way into the index.

    Attributes:
        locator: where its pixels are, for `read_bytes`; {} when there are none.
        data: the encoded picture where it came with the row, else None and the locator is read.
        error: why there is no picture.
    """

    key: str
    url: str | None = None
    caption: str | None = None
    locator: dict[str, Any] | None = None
    data: bytes | None = None
    error: str | None = None


@dataclass(frozen=True)
class Slice:
    """One unit of work: `count` rows of a source from `start` (of one file, where the source has files)."""

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

    def vectors(self, part: Slice) -> np.ndarray | None:
        """Embeddings of a part's rows, float [rows, dim], where they are already computed; else None."""


class FolderSource:
    """Pictures as files; beside each perhaps KEY.txt (caption) and KEY.json (url, caption), as img2dataset writes."""

    kind = "folder"

    def __init__(self, url: str, files: dict[str, int]) -> None:
        self.url, self.files = url, {path: size for path, size in files.items() if path.lower().endswith(PICTURES)}
        self.paths = list(self.files)
        self.beside = {path for path in files if path.endswith((".txt", ".json"))}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def parts(self, rows: int) -> list[Slice]:
        return slices(len(self.paths), rows)

    def items(self, part: Slice) -> Iterator[Item]:
        for path in self.paths[part.start : part.start + part.count]:
            stem = os.path.splitext(path)[0]
            text = {ext: read_file(stem + ext) for ext in (".txt", ".json") if stem + ext in self.beside}
            key = path[len(self.url) :].lstrip("/") or os.path.basename(path)
            yield described(Item(key, locator={"file": path}), text.get(".txt"), text.get(".json"))

    def vectors(self, part: Slice) -> None:
        return None


class TarSource:
    """Webdataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json; one tar is one part."""

    kind = "tar"

    def __init__(self, url: str, files: dict[str, int]) -> None:
        self.url, self.files = url, {path: size for path, size in files.items() if path.endswith(".tar")}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def parts(self, rows: int) -> list[Slice]:
        return [Slice(0, 0, path) for path in self.files]

    def items(self, part: Slice) -> Iterator[Item]:
        key = ""
        found: dict[str, tarfile.TarInfo] = {}
        with fsspec.open(part.file, "rb") as file:
            try:
                # "r:" refuses compressed tars, whose members cannot be found again by offset
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        folder, _, name = member.name.rpartition("/")
                        stem, _, ext = name.partition(".")
                        if found and f"{folder}/{stem}" != key:
                            yield from self._item(tar, part.file, key, found)
                            found = {}
                        key = f"{folder}/{stem}"
                        if member.isfile():
                            found[f".{ext.lower()}"] = member
                    yield from self._item(tar, part.file, key, found)
                file.seek(max(0, self.files[part.file] - 1024))
                if file.read().strip(b"\0"):  # tarfile takes a cut header for the end
                    raise tarfile.ReadError("no end mark")
            except tarfile.ReadError as error:
                yield Item(os.path.basename(part.file), error=f"{part.file}: not a whole, uncompressed tar: {error}")

    @staticmethod
    def _item(tar: tarfile.TarFile, path: str, key: str, found: dict[str, tarfile.TarInfo]) -> Iterator[Item]:
        def content(ext: str) -> bytes | None:
            file = tar.extractfile(found[ext]) if ext in found else None
            return file.read() if file else None

        picture = next((ext for ext in PICTURES if ext in found), None)
        if picture is not None:
            where = {"file": path, "offset": found[picture].offset_data, "size": found[picture].size}
            item = Item(key.lstrip("/"), locator=where, data=content(picture))
            yield described(item, content(".txt"), content(".json"))

    def vectors(self, part: Slice) -> None:
        return None


def described(item: Item, text: bytes | None, facts: bytes | None) -> Item:
    """Fill url, caption and key from the files beside a picture; JSON that does not parse is no reason to lose it."""
    if facts is not None:
        try:
            content = json.loads(facts)
        except ValueError:
            content = None
        if isinstance(content, dict):
            by_name = {str(name).lower(): value for name, value in content.items()}
            item.url = first_text(by_name, URL_COLUMNS)
            item.caption = first_text(by_name, ("caption", *CAPTION_COLUMNS))
            item.key = first_text(by_name, ("key",)) or item.key
    if text is not None:
        item.caption = text.decode("utf-8", "replace")
    return item


def first_text(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds something, as text."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), None)


def slices(total: int, rows: int, file: str = "") -> list[Slice]:
    """Cut `total` rows into units of `rows`."""
    return [Slice(start, min(rows, total - start), file) for start in range(0, total, rows)]


def listing_facts(files: dict[str, int]) -> dict[str, Any]:
    """Count, bytes and a digest of a listing; a picture renamed, added, removed or of another size changes it."""
    digest = hashlib.sha256()
    for path, size in files.items():
        digest.update(f"{path}\0{size}\n".encode())
    return {"files": len(files), "bytes": sum(files.values()), "listing": digest.hexdigest()[:16]}


def read_file(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def read_bytes(locator: dict[str, Any]) -> bytes:
    """The encoded picture a locator points at.

    Raises:
        AuditError: it is not there any more.
    """
    try:
        if "column" in locator:
            from audit.index import tables

            return tables.read_cell(locator)
        if "offset" in locator:
            with fsspec.open(locator["file"], "rb") as file:
                file.seek(locator["offset"])
                return bytes(file.read(locator["size"]))
        return read_file(locator["file"])
    except (OSError, IndexError, KeyError) as error:
        raise AuditError(f"{locator.get('file')}: the picture the index points at cannot be read: {error}") from error


def decode(data: bytes) -> Image.Image:
    """An encoded picture as RGB, turned as its EXIF says. Raises whatever the decoder does on broken input."""
    with Image.open(io.BytesIO(data)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def list_files(fs: Any, root: str, remote: bool) -> dict[str, int]:
    """Every file below a folder (or the file itself) with its size, sorted by path; hidden ones left out."""
    return {
        fs.unstrip_protocol(path) if remote else path: size
        for path, size in list_tree(fs, root).items()
        if not any(part.startswith(".") for part in path[len(root) :].split("/"))
    }


def find_sources(images: Sequence[str], columns: Columns) -> list[Source]:
    """What each argument is: a folder, tars, parquet, a saved or hub data set, embeddings.

    Raises:
        AuditError: nothing there, or nothing in it that is a picture or an embedding.
    """
    if not images:
        raise AuditError("no pictures named: be-audit index build IMAGES... (a folder, parquet, tars, a data set)")
    found: list[Source] = []
    for given in images:
        found.extend(_find(given, columns))
    return found


def _find(given: str, columns: Columns) -> list[Source]:
    from audit.index import tables

    try:
        fs, root = fsspec.core.url_to_fs(given if "://" in given else os.path.abspath(os.path.expanduser(given)))
        there = fs.exists(root)
    except (ImportError, ValueError, OSError) as error:
        raise AuditError(f"{given}: cannot open this kind of location: {error}") from error
    if not there:
        if hub := re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w.-]+))?", given):
            return [tables.DatasetSource({"file": hub[1], "revision": hub[2], "split": hub[3], "hub": True}, columns)]
        raise AuditError(f"{given}: no such file or folder")
    url = fs.unstrip_protocol(root) if "://" in given else root
    files = list_files(fs, root, "://" in given)
    names = {path[len(url) :].lstrip("/") for path in files}
    if {"dataset_dict.json", "state.json"} & names:
        return [tables.DatasetSource({"file": url, "revision": None, "split": None, "hub": False}, columns)]
    sources: list[Source] = []
    if any(path.endswith(".tar") for path in files):
        sources.append(TarSource(url, files))
    if any(path.lower().endswith(PICTURES) for path in files):
        sources.append(FolderSource(url, files))
    parquet = [path for path in files if path.endswith(".parquet")]
    npy = {path: size for path, size in files.items() if path.endswith(".npy") and "text_emb" not in path}
    if npy and not sources:
        return [tables.NpySource(url, npy, parquet, columns)]
    if sources:  # beside tars and pictures, img2dataset's parquet holds what it knew of them, not pictures
        parquet = [path for path in parquet if tables.holds_pictures(path)]
    if parquet:
        sources.append(tables.ParquetSource(url, parquet, columns))
    if not sources:
        raise AuditError(
            f"{given}: holds no pictures (files {', '.join(PICTURES)}; .tar; .parquet with image bytes or embeddings; "
            ".npy embeddings; a saved data set)"
        )
    return sources
