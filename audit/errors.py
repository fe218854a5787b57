"""What a user did wrong, said in one line."""

from __future__ import annotations


class AuditError(Exception):
    """Bad input, a mismatch or a missing file: one line that names the file, the field and the way out.

    The commands print the message alone and exit 2; nothing has been written or lost when it is raised.
    """


class Drained(Exception):
    """The job was asked to stop (SIGTERM, first Ctrl-C): the shard in hand is dropped, the command exits 75."""
