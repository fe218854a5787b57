"""Parquet files of users: opened where they are whole and not encrypted, refused by name where they are not."""

from __future__ import annotations

from collections.abc import Collection
from typing import IO, Any

import pyarrow.parquet as pq

from audit.base.errors import AuditError

_SIGNATURE = 28  # bytes behind a plain footer of an encrypted file: nonce and tag (the format's Encryption.md)


def open_parquet(path: str, file: IO[bytes], **options: Any) -> pq.ParquetFile:
    """A Parquet file from an open file.

    Args:
        path: for messages. options: of pyarrow.parquet.ParquetFile.

    Raises:
        AuditError: cut short, or encrypted: no key is ever asked for, and pyarrow ends the process where metadata of an
            encrypted column is looked at.
        OSError, pyarrow.ArrowException: damaged.
    """
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    encrypted = tail.endswith(b"PARE")
    if not encrypted and (size < 12 or not tail.endswith(b"PAR1")):
        raise AuditError(f"{path}: the Parquet file is cut short ({size} bytes, no footer at its end): get it again")
    file.seek(0)
    if not encrypted:
        found = pq.ParquetFile(file, **options)
        encrypted = int.from_bytes(tail[:4], "little") - found.metadata.serialized_size == _SIGNATURE
    if encrypted:
        raise AuditError(f"{path}: the Parquet file is encrypted: write it again without encryption")
    return found


def rows_at_once(metadata: pq.FileMetaData, names: Collection[str], most: int, size: int) -> int:
    """How many rows of some columns to decode together: `most`, or as many as hold about `size` bytes.

    Of the row group whose rows are largest on average. Values that a dictionary repeats count once: they may be more.
    """
    paths = [metadata.schema.column(at).path for at in range(metadata.num_columns)]
    places = [at for at, path in enumerate(paths) if path in names or path.partition(".")[0] in names]
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        held = sum(group.column(place).total_uncompressed_size for place in places)
        if held > size:
            most = min(most, max(1, size * group.num_rows // held))
    return most


def repeated(metadata: pq.FileMetaData, names: Collection[str]) -> list[str]:
    """Those of some columns that are little but references to a dictionary: a few bytes may stand for gigabytes."""
    places = {metadata.schema.column(at).path: at for at in range(metadata.num_columns)}
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    return [
        name for name in names if name in places and any(_is_repeated(group.column(places[name])) for group in groups)
    ]


def _is_repeated(chunk: pq.ColumnChunkMetaData) -> bool:
    if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
        return False
    behind = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
    return bool(behind < 4 * chunk.num_values)  # a reference has four bytes at most
