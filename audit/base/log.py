"""What every worker does, as JSON lines in `logs/HOST-PID.jsonl` of the run: for `status` and for machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
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
        self._in_hand: set[tuple[str, int]] = set()
        self._lock = threading.Lock()  # a shard ends in another thread than the one that begins the next

    def begin(self, stage: str, shard: int) -> None:
        """A line: a shard is computed from now on, and in hand until it ends."""
        self._in_hand.add((stage, shard))
        self._event("begin", stage, shard)

    def end(self, event: str, stage: str, shard: int, **facts: Any) -> None:
        """A line: a shard is in hand no more."""
        self._in_hand.discard((stage, shard))
        self._event(event, stage, shard, **facts)

    def batch(self, stage: str, shard: int, **facts: Any) -> None:
        """A line about a finished batch, where the last one is a while ago."""
        if time.monotonic() - self._last_batch > BATCH_SECONDS:
            self._last_batch = time.monotonic()
            self._event("batch", stage, shard, **facts)

    def _event(self, event: str, stage: str, shard: int, **facts: Any) -> None:
        """One line: time, event, shard, every shard in hand then, and facts that are JSON."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        in_hand = [f"{name} shard {number}" for name, number in sorted(self._in_hand.copy())]
        known = {"time": now, "event": event, "stage": stage, "shard": shard, "in_hand": in_hand}
        line = json.dumps({**known, **facts}) + "\n"
        with self._lock, contextlib.suppress(AuditError, OSError):
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


_logs: dict[tuple[str, int], WorkerLog] = {}


def worker_log(folder: Folder) -> WorkerLog:
    """This process's log in a folder; a forked child has one of its own."""
    return _logs.setdefault((folder.url, os.getpid()), WorkerLog(folder))
