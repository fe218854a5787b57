"""What a user did wrong, said in one line."""

from __future__ import annotations


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


def ends_the_job(error: Exception) -> bool:
    """Whether an error is the job's (bad input, a stop) and not that of the one shard it came from."""
    return isinstance(error, (AuditError, Drained)) and not isinstance(error, (StorageError, Damaged))
