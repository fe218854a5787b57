"""Where training pictures come from: folders, webdataset tars, parquet, `datasets` sets, embeddings already computed.

A source lists its parts (units of work, in a fixed order), reads a part's rows, and says for each row where its pixels
are, so that `read_bytes` finds them again later.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.base.ours import our_files
from audit.base.parquet import open_parquet
from audit.base.storage import check_name, is_saved_dataset
from audit.base.tree import list_tree, why_no_file
from audit.index.embeddings import NpySource
from audit.index.files import TEXTS, FolderSource, TarSource, first_dot
from audit.index.items import PICTURES, Columns, Source, TooLarge, check_size, content_mark, read_file
from audit.index.tables import DatasetSource, ParquetSource, holds_pictures, read_cell


def read_bytes(locator: dict[str, Any]) -> bytes:
    """The encoded picture a locator points at.

    Raises:
        AuditError: it is not there any more, or another picture is.
    """
    data = _read(locator)
    expected = locator.get("xxh3")  # an index of before has none
    if expected and expected != content_mark(data):
        raise AuditError(
            f"{locator.get('file')}: another picture lies there than when the index was made: give the same `be-audit "
            "index build` again, it describes again what has changed"
        )
    return data


def _read(locator: dict[str, Any]) -> bytes:
    try:
        if "column" in locator:
            return read_cell(locator)
        if "offset" in locator:
            check_size(locator["size"])
            with fsspec.open(locator["file"], "rb") as file:
                file.seek(locator["offset"])
                return bytes(file.read(locator["size"]))
        return read_file(locator["file"])
    except TooLarge as error:
        raise AuditError(f"{locator.get('file')}: {error}") from error
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise AuditError(f"{locator.get('file')}: the picture the index points at cannot be read: {error}") from error


def list_files(fs: Any, root: str, remote: bool, left: Counter[str]) -> dict[str, int]:
    """Every file below a folder (or the file itself) with its size, sorted by path.

    Hidden ones, and those of a run, an index or a report (base/ours.py), are counted in `left`.
    """
    listed = list_tree(fs, root)
    ours = our_files(fs, listed)
    files = {}
    for path, size in listed.items():
        if size < 0:
            left[why_no_file(path)] += 1
        elif path in ours:
            left["of be-audit's own"] += 1
        elif any(part.startswith(".") for part in path[len(root) :].split("/")):
            left["hidden"] += 1
        else:
            files[fs.unstrip_protocol(path) if remote else path] = size
    return files


def find_sources(images: Sequence[str], columns: Columns) -> tuple[list[Source], Counter[str]]:
    """What each argument is: a folder, tars, parquet, a saved or hub data set, embeddings; and what is left out.

    Returns:
        the sources, and reason -> files that are part of none.

    Raises:
        AuditError: nothing there, or nothing in it that is a picture or an embedding.
    """
    if not images:
        raise AuditError("no pictures named: be-audit index build IMAGES... (a folder, parquet, tars, a data set)")
    found: list[Source] = []
    left: Counter[str] = Counter()
    named: dict[str, dict[str, int]] = {}  # pictures named one by one, as a shell's pattern does, by folder
    for given in images:
        if given.lower().endswith(PICTURES) and (picture := _named_picture(given)):
            named.setdefault(picture[0], {}).update(picture[1])
        else:
            found.extend(_find(given, columns, left))
    return [*(FolderSource(folder, dict(sorted(files.items()))) for folder, files in named.items()), *found], left


def _named_picture(given: str) -> tuple[str, dict[str, int]] | None:
    """The folder of one local picture, and it and the texts beside it with their sizes; None where it is no file."""
    path = os.path.abspath(os.path.expanduser(given))
    if "://" in given or not os.path.isfile(path):
        return None
    stem = os.path.splitext(path)[0]
    beside = (text + extension for text in dict.fromkeys((stem, first_dot(stem))) for extension in TEXTS)
    return os.path.dirname(path), {name: os.path.getsize(name) for name in (path, *beside) if os.path.isfile(name)}


def _find(given: str, columns: Columns, left: Counter[str]) -> list[Source]:
    check_name(given)
    try:
        fs, root = fsspec.core.url_to_fs(given if "://" in given else os.path.abspath(os.path.expanduser(given)))
        there = fs.exists(root)
    except (ImportError, ValueError, OSError) as error:
        raise AuditError(f"{given}: cannot open this kind of location: {error}") from error
    if not there:
        if hub := re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w.-]+))?", given):
            return [DatasetSource({"file": hub[1], "revision": hub[2], "split": hub[3], "hub": True}, columns)]
        raise AuditError(f"{given}: no such file or folder")
    url = fs.unstrip_protocol(root) if "://" in given else root
    files = list_files(fs, root, "://" in given, left)
    if fs.isdir(root) and is_saved_dataset(fs, root):
        return [DatasetSource({"file": url, "revision": None, "split": None, "hub": False}, columns)]
    sources: list[Source] = []
    if any(path.lower().endswith(".tar") for path in files):
        sources.append(TarSource(url, files))
    if any(path.lower().endswith(PICTURES) for path in files):
        sources.append(FolderSource(url, files))
    parquet = [path for path in files if path.lower().endswith(".parquet")]
    npy = {path: size for path, size in files.items() if path.lower().endswith(".npy") and "text_emb" not in path}
    if npy and not sources:
        left.update(_others(files, [*npy, *parquet]))
        return [NpySource(url, npy, parquet, columns)]
    if sources:  # beside tars and pictures, img2dataset's parquet holds what it knew of them, not pictures
        parquet = [path for path in parquet if holds_pictures(path)]
    if parquet:
        sources.append(ParquetSource(url, parquet, columns))
    if not sources:
        raise AuditError(
            f"{given}: holds no pictures (files {', '.join(PICTURES)}; .tar; .parquet with image bytes or embeddings; "
            ".npy embeddings; a saved data set)"
        )
    left.update(_others(files, parquet))
    left["dead URLs"] += sum(
        _not_downloaded(path) for path in files if path.lower().endswith(".parquet") and path not in parquet
    )
    return sources


def _not_downloaded(path: str) -> int:
    """Rows of a metadata table of img2dataset whose picture could not be had."""
    with fsspec.open(path, "rb") as file:
        parquet = open_parquet(path, file)
        if not {"url", "status", "error_message"} <= set(parquet.schema_arrow.names):
            return 0
        status = parquet.read(columns=["status"]).column(0).cast(pa.string())
        return int(pc.sum(pc.not_equal(status, "success")).as_py() or 0)


def _others(files: dict[str, int], tables: Sequence[str]) -> Counter[str]:
    """Reason -> files that are no picture, no tar, no text beside a picture and none of `tables`."""
    stems = {os.path.splitext(path)[0] for path in files if path.lower().endswith(PICTURES)}
    stems |= {first_dot(stem) for stem in stems}
    tars = {os.path.splitext(path)[0] for path in files if path.lower().endswith(".tar")}
    left: Counter[str] = Counter()
    sidecars = {f"{stem}.parquet" for stem in tars}
    for path in files.keys() - set(tables):
        stem = os.path.splitext(path)[0]
        if (
            path in sidecars
            or path.lower().endswith(".tar")
            or path.lower().endswith(PICTURES)
            or (path.lower().endswith(TEXTS) and stem in stems)
        ):
            continue
        if path.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            left["compressed tars: unpack them"] += 1
        elif path.lower().endswith(TEXTS) and stem.removesuffix("_stats") not in tars | {""}:
            left["texts without a picture"] += 1
        else:
            left["of other kinds"] += 1
    return left
