"""Captions as 64-bit hashes: all that planning keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import xxhash

from audit.base.errors import AuditError
from audit.base.progress import Progress
from audit.base.storage import Folder
from audit.captions.files import CaptionFile
from audit.captions.rows import Rows
from audit.captions.streams import reading
from audit.captions.values import caption_text, is_empty

LONG = 1 << 18  # rows whose planning is shown on its way


def captions_digest(captions: pa.Array) -> int:
    """xxh3 of the xxh3 of every caption (0 for an empty one): what a plan knows of a shard's rows."""
    return int(xxhash.xxh3_64_intdigest(caption_hashes(captions).tobytes()))


def caption_hashes(captions: pa.Array) -> np.ndarray:
    """xxh3 of each caption, uint64 [n]; 0 for an empty one."""
    hashes = np.zeros(len(captions), np.uint64)
    values = captions.cast(pa.binary()).to_pylist()
    for row in np.flatnonzero(~is_empty(captions)).tolist():
        hashes[row] = xxhash.xxh3_64_intdigest(values[row]) or 1
    return hashes


class ShardDigests:
    """`captions_digest` of every shard, as the hashes of their rows come.

    Args:
        rows: of every shard, at least 1 each.

    Attributes:
        found: the digests of the shards that are whole.
    """

    def __init__(self, rows: list[int]) -> None:
        self.found: list[int] = []
        self._left = rows[::-1]
        self._running = xxhash.xxh3_64()

    def add(self, hashes: np.ndarray) -> None:
        """Hashes of the next rows, uint64."""
        at = 0
        while at < len(hashes):
            taken = min(self._left[-1], len(hashes) - at)
            self._running.update(hashes[at : at + taken].tobytes())
            at += taken
            self._left[-1] -= taken
            if not self._left[-1]:
                self._left.pop()
                self.found.append(self._running.intdigest())
                self._running.reset()


def hash_captions(files: list[CaptionFile], taken: list[int], staging: Folder) -> Iterator[tuple[int, np.ndarray]]:
    """xxh3 of every caption, 0 for an empty one, in blocks: number of the first row, and uint64 [rows of the block]."""
    at, rows = 0, sum(taken)
    with Progress(rows, "captions", "planning") if rows > LONG else nullcontext() as bar:
        for captions in _all_captions(files, taken, staging):
            yield at, caption_hashes(captions)
            at += len(captions)
            if bar:
                bar.add(len(captions))


def _all_captions(files: list[CaptionFile], taken: list[int], staging: Folder) -> Iterator[pa.Array]:
    """The captions of the first rows of each file, in batches."""
    for file, rows in zip(files, taken, strict=True):
        if not rows:
            continue
        left = rows
        with reading(file.path):
            for batch in Rows(file, staging.url, ()).batches():
                captions = caption_text(batch.column(0))[:left]
                yield captions
                left -= len(captions)
                if not left:
                    break
        if left:
            raise AuditError(f"{file.path}: damaged: it has {rows - left} rows where {rows} were announced")
