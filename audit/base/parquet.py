"""Parquet files of users: opened where they are whole and not encrypted, refused by name where they are not."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


def repeated(read: Callable[[int, int], bytes], metadata: pq.FileMetaData, names: Collection[str]) -> list[str]:
    """Those of some columns that are little but references to a dictionary: a few bytes may stand for gigabytes.

    Args:
        read: bytes of the file from, and up to, a place. metadata: its footer. names: of columns.

    Read as dictionaries they stay small. Others would grow by it: what a writer that gave up its dictionary wrote plain
    is gathered into one as it is read, a whole row group of it.
    """
    places = {metadata.schema.column(at).path: at for at in range(metadata.num_columns)}
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    return [
        name
        for name in names
        if name in places and any(_is_repeated(read, group.column(places[name])) for group in groups)
    ]


def _is_repeated(read: Callable[[int, int], bytes], chunk: pq.ColumnChunkMetaData) -> bool:
    if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
        return False
    behind = chunk.total_compressed_size - (chunk.data_page_offset - chunk.dictionary_page_offset)
    if behind >= 4 * chunk.num_values:  # too many for references, packed or not: nothing needs to be read
        return False
    dictionary = _dictionary_size(read(chunk.dictionary_page_offset, chunk.dictionary_page_offset + 32))
    if dictionary is None:
        return True
    # a reference has four bytes at most; a plain text has four of length before its own
    return bool(chunk.total_uncompressed_size - dictionary < 4 * chunk.num_values)


def _dictionary_size(header: bytes) -> int | None:
    """Uncompressed bytes of a dictionary page, by its header: type and size, 32-bit, in Thrift's compact protocol.

    Apache Parquet, parquet.thrift, PageHeader; None where that is not what is there.
    """
    values, at = list[int](), 0
    while len(values) < 2:
        if header[at : at + 1] != b"\x15":
            return None
        value = shift = 0
        for byte in header[at + 1 : at + 6]:
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                break
        at += 1
        values.append(value >> 1)  # zigzag, of what is never negative
    return values[1] if values[0] == 2 else None  # DICTIONARY_PAGE
