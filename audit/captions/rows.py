"""Rows of a caption file by position: Parquet and Arrow IPC files, in place or staged."""

from __future__ import annotations

import bisect
import itertools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from audit.base.errors import AuditError
from audit.base.parquet import repeated, rows_at_once
from audit.base.storage import join
from audit.captions.files import CaptionFile, content_digest
from audit.captions.streams import BATCH_BYTES, BATCH_ROWS, open_input
from audit.captions.values import is_caption


def find_column(schema: pa.Schema, name: str) -> int:
    """Place of the one column of that name, in any case where no spelling is exact; -1 when there is not one."""
    exact = [at for at, other in enumerate(schema.names) if other == name]
    loose = [at for at, other in enumerate(schema.names) if other.lower() == name.lower()]
    return (exact or loose)[0] if len(exact or loose) == 1 else -1


class Rows:
    """The caption and some columns of one file; remembers where it is, so reading forward decodes every row once.

    Parquet is decoded in batches from the row group asked for, so a giant row group is never held whole.

    Args:
        file: as planned.
        staging: URL of the folder with the staged copies.
        columns: columns to read beside the caption; those the file has not are left out.

    Raises:
        AuditError: the file is not the one that was planned, or cannot be opened.
    """

    def __init__(self, file: CaptionFile, staging: str, columns: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._path = join(staging, file.staged) if file.staged else file.path
        self._parquet = file.format == "parquet" and not file.staged
        with open_input(self._path) as source:
            size = source.seek(0, 2)
            if not file.staged and size != file.size:
                raise AuditError(f"{file.path}: changed since it was planned: {size} bytes where it had {file.size}")
            if not file.staged and content_digest(source, size, whole=False) != file.footer_sha256:
                raise AuditError(f"{file.path}: changed since it was planned: another file of the same size")
        caption = "caption" if file.staged else file.caption_col
        schema = pq.read_schema(open_input(self._path)) if self._parquet else self._ipc().schema
        places = [(name, find_column(schema, name)) for name in columns]
        self._names = [("", caption), *((name, schema.names[at]) for name, at in places if at >= 0)]
        needed = sorted({schema.get_field_index(name) for _, name in self._names})
        self._needed = [schema.names[at] for at in needed]
        self._starts = [0]  # of row groups; of record batches as far as they have been seen
        if self._parquet:
            # A bounded buffer and no prefetching: otherwise whole column chunks are held.
            facts = pq.read_metadata(open_input(self._path))
            fs, name = fsspec.core.url_to_fs(self._path)  # a few bytes here and there, not a store's blocks around them
            dictionaries = repeated(lambda start, end: fs.cat_file(name, start=start, end=end), facts, self._needed)
            options = {"buffer_size": 1 << 20, "pre_buffer": False, "read_dictionary": dictionaries}
            self._file = pq.ParquetFile(open_input(self._path), metadata=facts, **options)
            self._at_once = rows_at_once(facts, self._needed, BATCH_ROWS, BATCH_BYTES)
            for group in range(self._file.num_row_groups):
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        else:
            self._file = self._ipc(needed)
        self._seek(0)

    def _ipc(self, fields: list[int] | None = None) -> Any:
        fs, path = fsspec.core.url_to_fs(self._path)
        source = pa.memory_map(path) if isinstance(fs, LocalFileSystem) else open_input(self._path)
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields or []))

    def _seek(self, group: int) -> None:
        self._next = self._starts[group]  # the row that comes next
        self._batches = self.batches(group)
        self._rest: pa.RecordBatch | None = None

    def batches(self, group: int = 0) -> Iterator[pa.RecordBatch]:
        """From a row group or record batch on: the caption first, under an empty name, then the other columns."""
        found = self._parquet_batches(group) if self._parquet else self._ipc_batches(group)
        for batch in found:
            names = [name for name, _ in self._names]
            yield from in_reach(pa.record_batch([batch[name] for _, name in self._names], names=names))

    def _parquet_batches(self, group: int) -> Iterator[pa.RecordBatch]:
        groups = list(range(group, self._file.num_row_groups))
        # Threads gain nothing on two or three columns and cost an allocator arena each.
        return self._file.iter_batches(self._at_once, row_groups=groups, columns=self._needed, use_threads=False)

    def _ipc_batches(self, group: int) -> Iterator[pa.RecordBatch]:
        for at in range(group, self._file.num_record_batches):
            batch = self._file.get_batch(at)
            if at + 1 == len(self._starts):
                self._starts.append(self._starts[-1] + batch.num_rows)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)

    def read(self, start: int, count: int) -> pa.Table:
        """`count` rows from row `start` on, columns as `batches` has them.

        Raises:
            OSError, pyarrow.ArrowException: the file ends before, or cannot be decoded.
        """
        with self._lock:
            group = bisect.bisect_right(self._starts, start) - 1
            if start < self._next or self._starts[group] > self._next:
                self._seek(group)
            found, missing = [], count
            try:
                while missing:
                    batch = self._rest if self._rest is not None else next(self._batches, None)
                    if batch is None:
                        raise OSError(f"{self._path}: no row {start + count - missing}: changed since it was planned")
                    skipped = min(max(start - self._next, 0), batch.num_rows)
                    part = batch.slice(skipped, missing)
                    used = skipped + part.num_rows
                    self._rest = batch.slice(used) if used < batch.num_rows else None
                    self._next += used
                    missing -= part.num_rows
                    found.append(part)
            except BaseException:
                self._next = sys.maxsize  # where the iterator stands is unknown: seek the next time
                raise
            return pa.Table.from_batches([part for part in found if part.num_rows])


def in_reach(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in pieces whose values are about BATCH_BYTES each once what a dictionary repeats is written out."""
    lengths = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and is_caption(column.type):
            values = column.dictionary.cast(pa.large_binary())
            lengths += pc.fill_null(pc.binary_length(values).take(column.indices), 0).to_numpy(zero_copy_only=False)
    piece = np.cumsum(lengths) // BATCH_BYTES
    starts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist()]
    for start, end in itertools.pairwise([*starts, batch.num_rows]):
        yield batch.slice(start, end - start)
