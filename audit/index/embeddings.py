"""Sources that are embeddings already computed: .npy files with metadata tables, as clip-retrieval writes them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq

from audit.base.errors import AuditError
from audit.index.items import EMBEDDINGS, PLACE, Columns, Item, Slice, files_mark, listing_facts, slices
from audit.index.tables import Described, parquet_facts


class NpySource:
    """Embeddings in .npy files, float [rows, dim], one metadata parquet each (clip-retrieval: img_emb/, metadata/).

    A .npy file has the metadata of its number that is nearest: in the folder they have in common that lies deepest.
    """

    kind = EMBEDDINGS

    def __init__(self, url: str, files: dict[str, int], metadata: list[str], columns: Columns) -> None:
        self.url, self.files, self.named = url, files, columns
        by_number: dict[str, list[str]] = {}
        for path in metadata:
            by_number.setdefault(_number(path), []).append(path)
        self.metadata = {path: _nearest(path, by_number.get(_number(path), [])) for path in files}
        if metadata and None in self.metadata.values():
            missing = next(path for path, found in self.metadata.items() if found is None)
            raise AuditError(f"{missing}: no metadata parquet of the same number beside it")
        self.rows: dict[str, int] = {}
        for path, found in self.metadata.items():
            array = _load_npy(path)
            self.rows[path] = len(array)
            if found and parquet_facts(found)[0] != len(array):
                raise AuditError(f"{found}: {parquet_facts(found)[0]} rows where {path} has {len(array)} embeddings")

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.url, "rows": sum(self.rows.values()), **listing_facts(self.files)}

    def columns(self) -> str:
        return "; or ".join(dict.fromkeys(str(self._described(path)) for path in self.metadata.values() if path))

    def parts(self, rows: int) -> list[Slice]:
        return [part for path, count in self.rows.items() for part in slices(count, rows, path)]

    def mark(self, part: Slice) -> str:
        return files_mark(path for path in (part.file, self.metadata[part.file]) if path)

    def items(self, part: Slice) -> Iterator[Item]:
        metadata = self.metadata[part.file]
        numbers = range(part.start, part.start + part.count)
        if metadata is None:
            yield from (Item(str(number), locator={}, key_from=PLACE) for number in numbers)
            return
        described = self._described(metadata)
        with fsspec.open(metadata, "rb") as opened:
            table = pq.read_table(opened, columns=described.names).slice(part.start, part.count)
        for number, row in zip(numbers, table.to_pylist(), strict=False):
            item = described.item(row, number)
            item.locator = {}
            yield item

    def _described(self, metadata: str) -> Described:
        _, schema, _, blank = parquet_facts(metadata)
        return Described(schema, self.named, metadata, blank)

    def vectors(self, part: Slice) -> np.ndarray:
        return np.asarray(_load_npy(part.file)[part.start : part.start + part.count], np.float32)


def _nearest(path: str, metadata: list[str]) -> str | None:
    """Of the metadata of its number that of a .npy file. Raises AuditError where two could be it."""

    def depth(other: str) -> int:
        """Folders in common."""
        pairs = zip(path.split("/")[:-1], other.split("/")[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = [other for other in metadata if depth(other) == max(map(depth, metadata))]
    if len(nearest) > 1:
        raise AuditError(f"{path}: its metadata may be {nearest[0]} or {nearest[1]}: keep those that belong together")
    return nearest[0] if nearest else None


def _number(path: str) -> str:
    """The number a file name ends in: img_emb_00012.npy and metadata_12.parquet belong together."""
    digits = re.findall(r"\d+", os.path.basename(path))
    return digits[-1].lstrip("0") if digits else ""


@lru_cache(maxsize=2)
def _load_npy(path: str) -> np.ndarray:
    try:
        if "://" not in path:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with fsspec.open(path, "rb") as file:
                array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AuditError(f"{path}: not a whole .npy file of numbers: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise AuditError(f"{path}: embeddings are float [rows, dim]; this is {array.dtype} {list(array.shape)}")
    return array
