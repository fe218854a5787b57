"""Sources that are files: folders of pictures, and webdataset tars."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import fsspec

from audit.index.items import MOST_TEXT, PICTURES, Item, Slice, described, listing_facts, read_file, slices

TEXTS = (".txt", ".json", ".caption")
"""What lies beside a picture under its name: its caption, or url, caption and key as JSON."""


LONG_TEXTS = f"texts beside pictures, of more than {MOST_TEXT >> 20} MiB"
_CARRIED = 8 << 20  # bytes of a picture in a tar up to which it is read with its row; larger ones when their turn comes


class FolderSource:
    """Pictures as files; beside each perhaps KEY.txt (caption) and KEY.json (url, caption), as img2dataset writes."""

    kind = "folder"

    def __init__(self, url: str, files: dict[str, int]) -> None:
        self.url, self.files = url, {path: size for path, size in files.items() if path.lower().endswith(PICTURES)}
        self.paths = list(self.files)
        self.beside = {path: size for path, size in files.items() if path.endswith(TEXTS)}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def parts(self, rows: int) -> list[Slice]:
        return slices(len(self.paths), rows)

    def items(self, part: Slice) -> Iterator[Item]:
        for path in self.paths[part.start : part.start + part.count]:
            stem = os.path.splitext(path)[0]
            beside = {ext: self.beside[stem + ext] for ext in TEXTS if stem + ext in self.beside}
            text = {ext: read_file(stem + ext) for ext, size in beside.items() if size <= MOST_TEXT}
            yield from (Item(path, left_out=LONG_TEXTS) for _ in range(len(beside) - len(text)))
            key = path[len(self.url) :].lstrip("/") or os.path.basename(path)
            caption = text.get(".txt", text.get(".caption"))
            yield described(Item(key, locator={"file": path}), caption, text.get(".json"))

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
        self.url, self.files = url, {path: size for path, size in files.items() if path.endswith(".tar")}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, **listing_facts(self.files)}

    def parts(self, rows: int) -> list[Slice]:
        return [Slice(0, 0, path) for path in self.files]

    def items(self, part: Slice) -> Iterator[Item]:
        left: Counter[str] = Counter()
        with fsspec.open(part.file, "rb") as file:
            pictures, texts, error = _members(file, self.files[part.file], left)
            used: set[str] = set()
            for name, picture in pictures:
                key = name.rpartition(".")[0]
                own = key if key in texts else _first_dot(key)
                used.add(own)
                found = {text.extension: _content(file, text) for text in texts.get(own, [])}
                where = {"file": part.file, "offset": picture.offset, "size": picture.size}
                data = _content(file, picture) if picture.size <= _CARRIED else None
                item = Item(key.lstrip("/"), locator=where, data=data)
                yield described(item, found.get(".txt", found.get(".caption")), found.get(".json"))
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
        file.seek(max(0, size - 1024))
        if file.read().strip(b"\0"):  # tarfile takes a cut header for the end
            raise tarfile.ReadError("no end mark")
    except tarfile.ReadError as error:
        return pictures, texts, error
    return pictures, texts, None


def _first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _content(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
