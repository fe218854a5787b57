"""What every worker does, as JSON lines in `logs/HOST-PID.jsonl` of the run: for `status` and for machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from datetime import datetime, timezone
from typing import Any

from audit.base.errors import AuditError
from audit.base.storage import Folder

LOGS = "logs"
BATCH_SECONDS = 10.0  # at most one line about batches in so many seconds
_KEPT = 2000  # lines of a log on an object store, which cannot be appended to


class WorkerLog:
    """The log of this process in one folder. A log that cannot be written never fails the work it tells of."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.name = folder, f"{LOGS}/{socket.gethostname()}-{os.getpid()}.jsonl"
        self._lines: list[str] = []
        self._last_batch = self._last_upload = 0.0

    def event(self, event: str, **facts: Any) -> None:
        """One line: time, event, and facts that are JSON."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **facts}) + "\n"
        with contextlib.suppress(AuditError, OSError):
            if self.folder.local:
                path = self.folder.path(self.name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)
                return
            self._lines = [*self._lines[-_KEPT:], line]
            if event != "batch" or time.monotonic() - self._last_upload > 60:
                self._last_upload = time.monotonic()
                self.folder.write(self.name, "".join(self._lines).encode())

    def batch(self, **facts: Any) -> None:
        """A line about a finished batch, where the last one is a while ago."""
        if time.monotonic() - self._last_batch > BATCH_SECONDS:
            self._last_batch = time.monotonic()
            self.event("batch", **facts)


_logs: dict[tuple[str, int], WorkerLog] = {}


def worker_log(folder: Folder) -> WorkerLog:
    """This process's log in a folder; a forked child has one of its own."""
    return _logs.setdefault((folder.url, os.getpid()), WorkerLog(folder))
