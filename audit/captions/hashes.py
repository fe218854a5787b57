"""Captions as 64-bit hashes: all that planning keeps of them, and how it finds equal ones."""

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

_CHUNK = 1 << 18  # rows looked at together; bounds every temporary array of planning


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


def hash_captions(files: list[CaptionFile], taken: list[int], staging: Folder) -> tuple[np.ndarray, int]:
    """xxh3 of every caption, uint64 [rows], 0 for an empty one; and how many are empty."""
    hashes = np.zeros(sum(taken), np.uint64)
    empty = at = 0
    bar = Progress(len(hashes), "captions", "planning") if len(hashes) > _CHUNK else None
    with bar or nullcontext():
        for captions in _all_captions(files, taken, staging):
            found = hashes[at : at + len(captions)] = caption_hashes(captions)
            empty += int((found == 0).sum())
            at += len(captions)
            if bar:
                bar.add(len(captions))
    return hashes, empty


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


def resolve_first(hashes: np.ndarray) -> None:
    """Overwrite every hash by the index of the first row that has it (its own index where it is 0), in place.

    The hashes are grouped by their top bits. An index has none of these set, so once group 0 is done what has been
    overwritten cannot be taken for a hash of a later group, and no second array of this size is needed.
    """
    bits = min(max(len(hashes) // _CHUNK, 1).bit_length(), 8)
    shift = np.uint64(64 - bits)
    for group in range(1 << bits):
        parts = [at + np.flatnonzero(block >> shift == group) for at, block in blocks(hashes)]
        rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        values = hashes[rows]
        if group == 0:
            hashes[rows[values == 0]] = rows[values == 0]
            rows, values = rows[values != 0], values[values != 0]
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        hashes[rows] = rows[first][inverse]


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((at, array[at : at + _CHUNK]) for at in range(0, len(array), _CHUNK))
