"""Which caption files there are: files, folders, globs, URLs and data set names become a sorted list, with what is not.

Nothing is left out without being counted.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from audit.base.errors import AuditError
from audit.base.ours import our_files
from audit.base.storage import check_name, is_saved_dataset
from audit.base.text import reasons
from audit.base.tree import NO_FILE, SAME_FILE, list_tree, why_no_file
from audit.captions.streams import HUB_NAME
from audit.captions.text_lines import PACKED, first_line, packing, unpacked_name

KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Extensions that captions are read from; the text formats compressed too (PACKED)."""
TEXT_FORMATS = ("jsonl", "csv")
_SAVED = (".arrow", "dataset_info.json", "state.json", "dataset_dict.json")  # what save_to_disk writes
_BESIDE = "beside a saved data set"
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d{5}_of_\d{5})?\.arrow")  # rows that `datasets` made of others
_FOLDERS = "folders, read where named or by **"
_READ = ", ".join(KINDS) + f", the last five also {', '.join(PACKED)}"


@dataclass(frozen=True)
class Source:
    """A path, URL or data set name and its format, before anything of it is read."""

    path: str
    format: str


@dataclass
class Found:
    """What the inputs named.

    Attributes:
        sources: what is read, sorted by path.
        left_out: of folders and globs, reason -> how many files are not read.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_captions(inputs: Sequence[str | os.PathLike[str]]) -> Found:
    """Expand files, folders, globs, fsspec URLs and `datasets` names into the sorted list of what to read.

    A folder gives its Parquet, Arrow, JSONL, CSV and TSV files at any depth, without hidden ones (`.x`, `_x`) and
    without what a run, an index or a report wrote (base/ours.py); a folder written by `Dataset.save_to_disk` is one
    data set. What exists as a path is never looked up on the hub. `OWNER/NAME[@REVISION][:SPLIT]` is a data set of the
    hub, `FOLDER:SPLIT` one split of a saved dict. A file that has several names is read once.

    Raises:
        AuditError: an input that does not exist, holds no captions, or has an unsupported extension.
    """
    sources: dict[str, Source] = {}
    left: dict[str, str] = {}
    for text in inputs:
        for source in _expand(check_name(os.fspath(text)), left):
            sources[check_name(source.path)] = source
    if not sources:
        raise AuditError("no caption files given: pass files, folders, globs or data set names")
    for path in _other_names(sources):
        left[path] = SAME_FILE
        del sources[path]
    counts = Counter(reason for path, reason in left.items() if path not in sources)
    return Found([sources[path] for path in sorted(sources)], counts)


def _other_names(sources: dict[str, Source]) -> set[str]:
    """Those of some sources that others are already: links, hard links, files of a data set that is one of them."""
    folders = {path: re.sub(r":([^:/]+)$", r"/\1", path) for path in sources}  # where the files of a split lie
    sets = tuple(f"{folders[path]}/" for path, source in sources.items() if source.format == "dataset")
    others = {path for path, folder in folders.items() if folder.startswith(sets)}
    names: dict[tuple[int, int], list[str]] = {}
    for path in sources:
        with contextlib.suppress(OSError, ValueError):  # URLs, names on the hub
            facts = os.stat(path)
            names.setdefault((facts.st_dev, facts.st_ino), []).append(path)
    for same in names.values():
        if len(same) > 1:
            same.sort(key=lambda path: (os.path.islink(path), os.path.realpath(path) != path, path))
            others.update(same[1:])
    return others


def _expand(text: str, left: dict[str, str]) -> list[Source]:
    """The sources of one input; what is not read goes into `left`, path -> reason."""
    try:
        fs, path = fsspec.core.url_to_fs(text)
        local = isinstance(fs, LocalFileSystem)
        path = os.path.normpath(path) if local else path  # `../data/x` and `x` are one file
        if fs.isfile(path):
            return [Source(path if local else text, _format(text))]
        if fs.isdir(path):
            tree = list_tree(fs, path)
            if is_saved_dataset(fs, path):
                others = {name for name in tree if not name.endswith(_SAVED)}
                left.update(dict.fromkeys(others | _beside_saved(fs, tree), _BESIDE))
                return [Source(path if local else text, "dataset")]
            below, names = path, list(tree)
            around, here = names, {name: why_no_file(name) for name, size in tree.items() if size == NO_FILE}
        elif any(letter in text for letter in "*?["):
            below = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            names, around, here = _matching(fs, path, below)
        else:
            return [_missing(text, fs, path)]
        files = _readable(names, our_files(fs, around), below, text, here)
        beside = _beside_saved(fs, files)
        here.update(dict.fromkeys(beside, _BESIDE))
        files = [name for name in files if name not in beside]
    except AuditError:
        raise
    except Exception as error:  # every file system driver has its own exceptions
        raise AuditError(f"{text}: cannot be listed: {first_line(error)}") from error
    if not files:
        instead = f"; there are {reasons(Counter(here.values()))}" if here else ""
        raise AuditError(f"{text}: no file there that captions are read from: {_READ}{instead}")
    paths = {name: name if local else fs.unstrip_protocol(name) for name in names}
    left.update({paths[name]: reason for name, reason in here.items()})
    return [Source(paths[name], _format(name)) for name in files]


def _beside_saved(fs: Any, names: Iterable[str]) -> set[str]:
    """Arrow files in folders of saved data sets, or of the cache of `datasets`, that are none of their data.

    `map` and `filter` leave there what they made of the same rows.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        if name.endswith(".arrow"):
            folders.setdefault(name.rpartition("/")[0], set()).add(name)
    beside: set[str] = set()
    for folder, files in folders.items():
        data = _data_files(fs, folder)
        made = {name for name in files if _CACHE.fullmatch(name.rpartition("/")[2])}
        if data is not None:
            beside |= files - data
        elif made and fs.exists(f"{folder}/dataset_info.json"):
            beside |= made
    return beside


def _data_files(fs: Any, folder: str) -> set[str] | None:
    """The files with the rows of a data set that was saved in a folder; None where none was."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        state = json.loads(fs.cat_file(f"{folder}/state.json"))
        return {f"{folder}/{each['filename']}" for each in state["_data_files"]}
    return None


def _readable(names: Iterable[str], ours: set[str], root: str, asked: str, left: dict[str, str]) -> list[str]:
    """Those of some files that are read. Statistics and settings lie beside data as .json: read by name only."""
    below = len(root.rstrip("/")) + 1
    files = []
    json_asked = unpacked_name(asked).endswith(".json")
    for name in names:
        extension = _extension(name)
        if name in left:
            continue
        if name in ours:
            left[name] = "of be-audit's own"
        elif any(part.startswith((".", "_")) for part in name[below:].split("/")):
            left[name] = "hidden"
        elif extension is None:
            left[name] = "of other kinds"
        elif extension == ".json" and not json_asked:
            left[name] = ".json, read where named"
        else:
            files.append(name)
    return files


def _matching(fs: Any, pattern: str, fixed: str) -> tuple[list[str], list[str], dict[str, str]]:
    """What matches a glob, the files whose marks tell our own folders, and why which of the matches are no files.

    Locally links to folders are followed, as fsspec does not. `fixed`: the glob's plain part.
    """
    if not isinstance(fs, LocalFileSystem):
        kinds = {name: info["type"] for name, info in fs.glob(pattern, detail=True).items()}
        odd = {name: _FOLDERS for name, kind in kinds.items() if kind != "file" and "**" not in pattern}
        found = [name for name, kind in kinds.items() if kind == "file"]
        return [*found, *odd], found, odd
    if "**" in pattern:
        like = re.compile(glob_translate(pattern))
        tree = list_tree(fs, fixed or "/")
        found = [name for name in tree if like.match(name)]
        return found, list(tree), {name: why_no_file(name) for name in found if tree[name] == NO_FILE}
    found = glob.glob(pattern)
    folders = {name: _FOLDERS for name in found if os.path.isdir(name)}
    others = {name: why_no_file(name) for name in found if not os.path.isfile(name) and name not in folders}
    return found, [name for name in found if os.path.isfile(name)], {**folders, **others}


def _missing(text: str, fs: Any, path: str) -> Source:
    """What a text that is no path can still mean: a split of a saved dict, or a name on the hub."""
    folder, _, split = path.rpartition(":")
    if folder and split and fs.isdir(folder) and is_saved_dataset(fs, folder):
        return Source(path if isinstance(fs, LocalFileSystem) else text, "dataset")
    if HUB_NAME.fullmatch(text) and _extension(text) is None and not text.startswith("."):
        return Source(text, "dataset")
    raise AuditError(f"{text}: no such file or folder")


def _extension(path: str) -> str | None:
    """The extension of KINDS that a name ends in, without what says that it is compressed."""
    name = unpacked_name(path)
    extension = next((extension for extension in KINDS if name.endswith(extension)), None)
    return (
        None if extension and packing(path) and KINDS[extension] not in TEXT_FORMATS else extension
    )  # no Parquet in a gzip


def _format(path: str) -> str:
    extension = _extension(path)
    if extension is None:
        raise AuditError(f"{path}: unsupported kind of file; captions are read from {_READ}")
    return KINDS[extension]
