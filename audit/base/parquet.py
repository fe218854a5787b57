"""Parquet files of users: opened where they are whole and not encrypted, refused by name where they are not."""

from __future__ import annotations

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
