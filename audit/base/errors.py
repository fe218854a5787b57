"""What a user did wrong, said in one line."""

from __future__ import annotations

import errno

import pyarrow as pa

_NOTHING_LEFT = {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


class AuditError(Exception):
    """Bad input, a mismatch or a missing file: one line that names the file, the field and the way out.

    The commands print the message alone and exit 2; nothing has been written or lost when it is raised.
    """


class StorageError(AuditError):
    """A file that cannot be written or opened now. A shard that meets it is tried again: stores have bad moments."""


class Damaged(AuditError):
    """A file of ours that is not what was written: named, never believed; the commands exit 3, and verify repairs."""


class Drained(Exception):
    """The job was asked to stop (SIGTERM, first Ctrl-C): the shards in hand are dropped, the command exits 75."""


class Broken(Exception):
    """Every worker failed shard after shard: the job stopped with shards left, and nothing that needs them was begun.

    What is done stays done; the command exits 3 and goes on when it is given again.
    """


def check_machine(path: str, error: BaseException) -> None:
    """Raise StorageError where what a reader met says that no thread, file handle or memory is left here.

    Nothing is known of the file then: to call it damaged would have it thrown away. pyarrow raises a plain
    ArrowException, of no kind, for a thread that it cannot start. Its ArrowMemoryError may be either: damaged lengths
    ask for any memory.
    """
    if type(error) is pa.ArrowException or (isinstance(error, OSError) and error.errno in _NOTHING_LEFT):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise StorageError(
            f"{path}: cannot be read: {reason}: too little memory, or too many processes or open files, here"
        ) from error


def ends_the_job(error: Exception) -> bool:
    """Whether an error is the job's (bad input, a stop) and not that of the one shard it came from."""
    return isinstance(error, (AuditError, Drained)) and not isinstance(error, (StorageError, Damaged))
