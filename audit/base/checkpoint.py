"""A checkpoint: many commits in one file, so that a reader need not open each. A cache, and never believed by itself.

It holds the columns of commits, and of each the size and stamp its file had in the listing it was read after. A commit
counts from it only where the present listing shows that very size and stamp. Before it come 64 letters: sha256 of the
ledger it is of and of all that follows, an Arrow file. Whatever is wrong with it, the commits are read as without it.
"""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from audit.base.committed import COLUMNS
from audit.base.errors import AuditError
from audit.base.storage import Folder

FORMAT = 1
NAME = "checkpoint"
MANY = 1000  # commits read one by one that make a new checkpoint worth its writing
COLUMNS_AND_FILES = pa.schema([*COLUMNS, ("file_size", pa.int64()), ("file_stamp", pa.uint64())])


def stamp_number(stamp: str) -> int:
    """A stamp of a listing as 64 bits; 0 for one that tells nothing."""
    return xxhash.xxh3_64_intdigest(stamp.encode()) or 1 if stamp else 0


def load_checkpoint(folder: Folder, place: str, ledger: str) -> pa.Table | None:
    """The checkpoint of a folder of commits, a table COLUMNS_AND_FILES by shard; None where there is none of use.

    Args:
        place: the folder of commits. ledger: what tells its ledger from every other.
    """
    try:
        data = pa.py_buffer(folder.read(f"{place}/{NAME}"))
        if bytes(data[:64]) != _digest(ledger, data[64:]):  # before pyarrow reads it, which bears no damage
            return None
        table = pa.ipc.open_file(data[64:]).read_all()
    except (AuditError, OSError, ValueError, pa.ArrowException):
        return None
    return table if table.schema == COLUMNS_AND_FILES else None


def save_checkpoint(folder: Folder, place: str, ledger: str, table: pa.Table) -> None:
    """Write a checkpoint, a table in one piece by shard; nothing is said where it cannot be written."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    with contextlib.suppress(AuditError, OSError):
        folder.write(f"{place}/{NAME}", _digest(ledger, data) + bytes(data))


def known_places(
    known: pa.Table, shards: NDArray[np.int64], sizes: NDArray[np.int64], stamps: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Where a checkpoint has the commit whose file is listed so, by file [n]; -1 where it has not this very one."""
    if not known.num_rows:
        return np.full(len(shards), -1, np.int64)
    theirs = known["shard"].to_numpy()
    at = np.minimum(np.searchsorted(theirs, shards), len(theirs) - 1)
    same = (theirs[at] == shards) & (known["file_size"].to_numpy()[at] == sizes)
    same &= (known["file_stamp"].to_numpy()[at] == stamps) & (stamps != 0)
    return np.where(same, at, -1)


def _digest(ledger: str, data: pa.Buffer) -> bytes:
    total = hashlib.sha256(f"{FORMAT} {ledger}\n".encode())
    total.update(data)
    return total.hexdigest().encode()
