"""One part of an index: pictures read, decoded ahead by threads, described, written and committed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from audit.base.commits import Commit, Ledger
from audit.base.errors import AuditError
from audit.base.progress import Progress
from audit.index.items import Item, Slice, Source, content_mark, decode
from audit.index.sources import read_bytes

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

MARK = b"source"
"""Key of a part's schema metadata: `Source.mark` of the files it was made from."""
LEFT_OUT = "left out: "  # before a reason, in the counts of a commit
LOOK_AHEAD = 8  # batches whose pictures are looked at together: equal sizes among them share a batch
_WINDOW_BYTES = 32 << 20  # encoded pictures that wait for their turn together
ALL_FAILED = 10  # from this many rows on, a part without one readable picture is a wrong folder, not bad luck


def part_schema(dim: int) -> pa.Schema:
    """Columns of `parts/000/00000.arrow`. `locator` is JSON: enough to read the pixels again."""
    names = ("key", "key_from", "url", "caption", "source", "locator", "status", "error")
    text = {name: pa.string() for name in names}
    return pa.schema({"id": pa.int64(), **text, "embedding": pa.list_(pa.float16(), dim)})


def embed_part(
    number: int,
    source: Source,
    part: Slice,
    descriptor: Descriptor,
    batch_size: int,
    pool: ThreadPoolExecutor,
    ledger: Ledger,
    check: Callable[[], None],
    progress: Progress,
) -> Commit:
    """Describe a part's pictures and commit its table.

    Args:
        batch_size: pictures described at once. pool: of threads that decode. check: called often; raises to stop.
    Raises:
        AuditError: a part of ten rows and more without one readable picture.
    """
    start, mark = time.perf_counter(), source.mark(part)  # before it is read: what changes meanwhile is another
    items: list[Item] = []
    vectors: list[np.ndarray] = [np.empty((0, descriptor.dim), np.float32)]
    left, done = Counter[str](), 0

    def on_batch(pictures: int) -> None:
        nonlocal done
        check()
        done += pictures
        progress.add(pictures if progress.unit == "pictures" else 0)

    for window, found in described(source, part, descriptor, batch_size, pool, left, on_batch):
        items.extend(window)
        vectors.append(found)
        on_batch(len(items) - done)  # those that have no picture
    progress.add(1 if progress.unit == "parts" else 0)
    embeddings = np.concatenate(vectors)
    for position in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)):
        if items[position].error is None:
            items[position].error = "the descriptor is not a finite, non-zero vector"
    errors = [item for item in items if item.error is not None]
    if len(errors) == len(items) >= ALL_FAILED:
        where = part.file or source.kind
        raise AuditError(f"part {number} ({where}): not one picture could be read; the first: {errors[0].error}")
    table = _table(number, source.kind, items, embeddings, descriptor.dim).replace_schema_metadata({MARK: mark})
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
    on_batch: Callable[[int], None],
) -> Iterator[tuple[list[Item], np.ndarray]]:
    """A part's rows with their vectors, float32 [rows, dim], NaN where there is none; `left` counts what is no row."""
    given = source.vectors(part)
    if given is not None:
        items = list(source.items(part))
        yield items, _checked(given, items, descriptor, source)
        return
    for window, prepared in _prepared(_rows(source.items(part), left), descriptor, LOOK_AHEAD * batch_size, pool):
        pictures = [picture for picture in prepared if picture is not None]
        vectors = np.full((len(window), descriptor.dim), np.nan, np.float32)
        if pictures:
            found = descriptor.embed(pictures, batch_size, on_batch)
            vectors[[picture is not None for picture in prepared]] = found.numpy()
        yield window, vectors


def _rows(items: Iterator[Item], left: Counter[str]) -> Iterator[Item]:
    for item in items:
        if item.left_out is None:
            yield item
        else:
            left[item.left_out] += 1


def _prepared(
    items: Iterator[Item], descriptor: Descriptor, most: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Item], list[np.ndarray | None]]]:
    """Windows of at most so many pictures decoded and resized by threads, one window ahead of the network."""

    def prepare(item: Item) -> np.ndarray | None:
        try:
            if item.error is not None:
                return None
            data = item.data if item.data is not None else read_bytes(item.locator or {})
            if item.locator:
                item.locator["xxh3"] = content_mark(data)
            return descriptor.prepare(decode(data))
        except Exception as error:  # decoders raise anything on broken input: a row's error, never the job's
            item.error = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        finally:
            item.data = None

    ahead: tuple[list[Item], list[Future[np.ndarray | None]]] | None = None
    for window in _windows(items, most):
        submitted = (window, [pool.submit(prepare, item) for item in window])
        if ahead:
            yield ahead[0], [future.result() for future in ahead[1]]
        ahead = submitted
    if ahead:
        yield ahead[0], [future.result() for future in ahead[1]]


def _windows(items: Iterator[Item], most: int) -> Iterator[list[Item]]:
    """Items, so many at a time, or fewer where their encoded pictures are large."""
    window: list[Item] = []
    held = 0
    for item in items:
        window.append(item)
        held += len(item.data or b"")
        if len(window) == most or held > _WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


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
        "key_from": [item.key_from for item in items],
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
