"""Sources that are files: folders of pictures, and webdataset tars."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import Any

import fsspec

from audit.index.items import PICTURES, Item, Slice, described, listing_facts, read_file, slices


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
