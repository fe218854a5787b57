"""Sources that are files: folders of pictures, and webdataset tars."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import fsspec

from audit.index.items import (
    MOST_TEXT,
    PICTURES,
    Item,
    Slice,
    described,
    files_mark,
    listing_facts,
    read_file,
    slices,
)

TEXTS = (".txt", ".json", ".caption")
"""What lies beside a picture under its name: its caption, or url, caption and key as JSON."""


UNTOLD = "texts of which a tar has another number than pictures of their name"
LONG_TEXTS = f"texts beside pictures, of more than {MOST_TEXT >> 20} MiB"
_CARRIED = 8 << 20  # bytes of a picture in a tar up to which it is read with its row; larger ones when their turn comes


class FolderSource:
    """Pictures as files; beside each perhaps KEY.txt (caption) and KEY.json (url, caption), as img2dataset writes."""

    kind = "folder"

    def __init__(self, url: str, files: dict[str, int]) -> None:
        self.url, self.files = url, {path: size for path, size in files.items() if path.lower().endswith(PICTURES)}
        self.paths, self.sizes = list(self.files), files
        self.beside: dict[str, dict[str, str]] = {}
        for path in files:
            stem, extension = os.path.splitext(path)
            if extension.lower() in TEXTS:
                self.beside.setdefault(stem, {})[extension.lower()] = path

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def columns(self) -> str:
        return ""

    def parts(self, rows: int) -> list[Slice]:
        return slices(len(self.paths), rows)

    def _beside(self, path: str) -> dict[str, str]:
        stem = os.path.splitext(path)[0]
        return self.beside.get(stem) or self.beside.get(first_dot(stem), {})

    def mark(self, part: Slice) -> str:
        paths = self.paths[part.start : part.start + part.count]
        return files_mark(name for path in paths for name in (path, *self._beside(path).values()))

    def items(self, part: Slice) -> Iterator[Item]:
        for path in self.paths[part.start : part.start + part.count]:
            beside = self._beside(path)
            text = {ext: read_file(name) for ext, name in beside.items() if self.sizes[name] <= MOST_TEXT}
            left = Counter({LONG_TEXTS: len(beside) - len(text)})
            key = path[len(self.url) :].lstrip("/") or os.path.basename(path)
            caption = text.get(".txt", text.get(".caption"))
            yield described(Item(key, locator={"file": path}), caption, text.get(".json"), left)
            yield from (Item(path, left_out=reason) for reason in left.elements())

    def vectors(self, part: Slice) -> None:
        return None


class _Member(NamedTuple):
    """Where a member's content lies in its tar."""

    extension: str
    offset: int
    size: int


class TarSource:
    """Webdataset tars: KEY.jpg, KEY.txt or KEY.caption, KEY.json, in any order; one tar is one part.

    A key is a member's name up to its last dot; what webdataset itself takes for a key, the name up to the first dot
    of its last component, lends its texts where that has none (KEY.jpg and KEY.crop.jpg of one KEY.txt).
    """

    kind = "tar"

    def __init__(self, url: str, files: dict[str, int]) -> None:
        self.url, self.files = url, {path: size for path, size in files.items() if path.lower().endswith(".tar")}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def columns(self) -> str:
        return ""

    def parts(self, rows: int) -> list[Slice]:
        return [Slice(0, 0, path) for path in self.files]

    def mark(self, part: Slice) -> str:
        return files_mark([part.file])

    def items(self, part: Slice) -> Iterator[Item]:
        left: Counter[str] = Counter()
        with fsspec.open(part.file, "rb") as file:
            pictures, texts, error = _members(file, self.files[part.file], left)
            used: set[str] = set()
            times, seen = Counter(name for name, _ in pictures), Counter[str]()
            for name, picture in pictures:
                key = name.rpartition(".")[0]
                own = key if key in texts else first_dot(key)
                used.add(own)
                beside = _texts_of(texts.get(own, []), seen[name], times[name])
                seen[name] += 1
                if beside is None:
                    left[UNTOLD] += 1
                found = {text.extension: _content(file, text) for text in beside or []}
                where = {"file": part.file, "offset": picture.offset, "size": picture.size}
                data = _content(file, picture) if picture.size <= _CARRIED else None
                item = Item(key.removeprefix("./").lstrip("/"), locator=where, data=data)  # `tar c .` writes ./KEY
                yield described(item, found.get(".txt", found.get(".caption")), found.get(".json"), left)
            if error is not None:
                yield Item(os.path.basename(part.file), error=f"{part.file}: not a whole, uncompressed tar: {error}")
        left["texts without a picture in tars"] = sum(len(texts[key]) for key in texts.keys() - used)
        yield from (Item(part.file, left_out=reason) for reason in left.elements())

    def vectors(self, part: Slice) -> None:
        return None


def _members(
    file: IO[bytes], size: int, left: Counter[str]
) -> tuple[list[tuple[str, _Member]], dict[str, list[_Member]], tarfile.ReadError | None]:
    """Of a tar: its pictures by name in order, the texts of every key, and what is wrong with it; from headers alone.

    What is neither is counted in `left`.
    """
    pictures: list[tuple[str, _Member]] = []
    texts: dict[str, list[_Member]] = {}
    try:
        # "r:" refuses compressed tars, whose members cannot be found again by offset
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
                key, dot, extension = member.name.rpartition(".")
                last = member.name.rpartition("/")[2]
                found = _Member(f".{extension.lower()}", member.offset_data, member.size)
                if member.isdir():
                    continue
                if not member.isreg():
                    left["links in tars"] += 1
                elif last.startswith("."):
                    left["hidden in tars"] += 1
                elif dot and found.extension in PICTURES:
                    pictures.append((member.name, found))
                elif dot and found.extension in TEXTS and member.size > MOST_TEXT:
                    left[LONG_TEXTS] += 1
                elif dot and found.extension in TEXTS:
                    texts.setdefault(key, []).append(found)
                else:
                    left["of other kinds in tars"] += 1
            _check_end(file, tar.offset, size)
    except tarfile.ReadError as error:
        return pictures, texts, error
    return pictures, texts, None


def _texts_of(texts: list[_Member], number: int, times: int) -> list[_Member] | None:
    """Of the texts of a key those of a picture, the so many-th of so many of one name; None where nothing tells.

    A name comes several times in a tar that was put together of others, whose keys begin anew.
    """
    by_extension: dict[str, list[_Member]] = {}
    for text in texts:
        by_extension.setdefault(text.extension, []).append(text)
    if any(len(found) != times for found in by_extension.values()):
        return None
    return [found[number] for found in by_extension.values()]


def _check_end(file: IO[bytes], end: int, size: int) -> None:
    """Raise ReadError where tarfile stopped before the end: at a cut header, or at the mark before another tar."""
    if size - end < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end mark")
    file.seek(end)
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(
                "no end mark, or more behind it: tars one behind the other are read as the first alone"
            )


def first_dot(key: str) -> str:
    """What webdataset takes for a key: a name up to the first dot of its last component."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _content(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
