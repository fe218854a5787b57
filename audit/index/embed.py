"""One part of an index: pictures read, decoded ahead by threads, described, written and committed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from audit.base.commits import Commit, Ledger
from audit.base.errors import AuditError
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.index.items import Item, Slice, Source, decode
from audit.index.sources import read_bytes

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

LEFT_OUT = "left out: "  # before a reason, in the counts of a commit
_BATCH_BYTES = 32 << 20  # encoded pictures that wait for their turn in one batch
ALL_FAILED = 10  # from this many rows on, a part without one readable picture is a wrong folder, not bad luck


def part_schema(dim: int) -> pa.Schema:
    """Columns of `parts/000/00000.arrow`. `locator` is JSON: enough to read the pixels again."""
    text = {name: pa.string() for name in ("key", "url", "caption", "source", "locator", "status", "error")}
    return pa.schema({"id": pa.int64(), **text, "embedding": pa.list_(pa.float16(), dim)})


def embed_part(
    number: int,
    source: Source,
    part: Slice,
    batches: Iterator[tuple[list[Item], np.ndarray]],
    dim: int,
    ledger: Ledger,
    stop: Stop,
    progress: Progress,
    left: Counter[str],
) -> Commit:
    """Gather a part's vectors and commit its table.

    Args:
        batches: what `described` yields.
        dim: length of a vector.
        left: reason -> how often; filled by `described`.
    Raises:
        AuditError: a part of ten rows and more without one readable picture.
        Drained: a stop was asked for.
    """
    start = time.perf_counter()
    items: list[Item] = []
    vectors: list[np.ndarray] = [np.empty((0, dim), np.float32)]
    for batch, found in batches:
        stop.check()
        items.extend(batch)
        vectors.append(found)
        progress.add(len(batch) if progress.unit == "pictures" else 0)
    progress.add(1 if progress.unit == "parts" else 0)
    embeddings = np.concatenate(vectors)
    for position in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)):
        if items[position].error is None:
            items[position].error = "the descriptor is not a finite, non-zero vector"
    errors = [item for item in items if item.error is not None]
    if len(errors) == len(items) >= ALL_FAILED:
        where = part.file or source.kind
        raise AuditError(f"part {number} ({where}): not one picture could be read; the first: {errors[0].error}")
    table = _table(number, source.kind, items, embeddings, dim)
    counts = {"ok": len(items) - len(errors), "error": len(errors)}
    counts |= {LEFT_OUT + reason: count for reason, count in left.items() if count}
    seconds = {"part": time.perf_counter() - start}
    return ledger.commit(number, table, counts, seconds)


def described(
    source: Source,
    part: Slice,
    descriptor: Descriptor,
    batch_size: int,
    pool: ThreadPoolExecutor,
    left: Counter[str],
) -> Iterator[tuple[list[Item], np.ndarray]]:
    """A part's rows with their vectors, float32 [rows, dim], NaN where there is none; `left` counts what is no row."""
    given = source.vectors(part)
    if given is not None:
        items = list(source.items(part))
        yield items, _checked(given, items, descriptor, source)
        return
    for batch, prepared in _prepared(_rows(source.items(part), left), descriptor, batch_size, pool):
        pictures = [picture for picture in prepared if picture is not None]
        vectors = np.full((len(batch), descriptor.dim), np.nan, np.float32)
        if pictures:
            vectors[[picture is not None for picture in prepared]] = descriptor.embed(pictures).numpy()
        yield batch, vectors


def _rows(items: Iterator[Item], left: Counter[str]) -> Iterator[Item]:
    for item in items:
        if item.left_out is None:
            yield item
        else:
            left[item.left_out] += 1


def _prepared(
    items: Iterator[Item], descriptor: Descriptor, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Item], list[np.ndarray | None]]]:
    """Batches decoded and resized by threads, one batch ahead of the network."""

    def prepare(item: Item) -> np.ndarray | None:
        try:
            if item.error is not None:
                return None
            data = item.data if item.data is not None else read_bytes(item.locator or {})
            return descriptor.prepare(decode(data))
        except Exception as error:  # decoders raise anything on broken input: a row's error, never the job's
            item.error = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        finally:
            item.data = None

    ahead: tuple[list[Item], list[Future[np.ndarray | None]]] | None = None
    for batch in _batches(items, batch_size):
        submitted = (batch, [pool.submit(prepare, item) for item in batch])
        if ahead:
            yield ahead[0], [future.result() for future in ahead[1]]
        ahead = submitted
    if ahead:
        yield ahead[0], [future.result() for future in ahead[1]]


def _batches(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Items in batches: of `batch_size`, or fewer where their encoded pictures are large."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(item.data or b"")
        if len(batch) == batch_size or held > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _checked(given: np.ndarray, items: list[Item], descriptor: Descriptor, source: Source) -> np.ndarray:
    if given.shape[1] != descriptor.dim:
        raise AuditError(
            f"{source.kind}: vectors of {given.shape[1]} where {descriptor.name} gives {descriptor.dim}: "
            "name the descriptor that made them with --sscd"
        )
    if len(items) != len(given):
        raise AuditError(f"{source.kind}: {len(given)} embeddings but {len(items)} rows of metadata")
    norms = np.linalg.norm(given, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return given / norms


def _table(number: int, kind: str, items: list[Item], embeddings: np.ndarray, dim: int) -> pa.Table:
    good = np.array([item.error is None for item in items], bool)
    flat = pa.array(np.where(good[:, None], embeddings, 0).astype(np.float16).ravel())
    columns = {
        "id": (np.int64(number) << 32) + np.arange(len(items), dtype=np.int64),
        "key": [_utf8(item.key) for item in items],
        "url": [_utf8(item.url) for item in items],
        "caption": [_utf8(item.caption) for item in items],
        "source": [kind] * len(items),
        "locator": [json.dumps(item.locator or {}) for item in items],
        "status": ["ok" if item.error is None else "error" for item in items],
        "error": [_utf8(item.error) for item in items],
        "embedding": pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(~good)),
    }
    return pa.table(columns, schema=part_schema(dim))


def _utf8(text: str | None) -> str | None:
    """Text without lone surrogates: JSON may hold them, and names of files that are not UTF-8."""
    return None if text is None else text.encode(errors="replace").decode()
