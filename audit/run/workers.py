"""Which workers of a run stand still, and why: from their logs, and from the processes of this host."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from audit.base.errors import AuditError
from audit.base.log import LOGS
from audit.base.storage import Folder
from audit.base.text import duration

SILENT = 600.0  # seconds after which a worker that has a shard in hand is said to be silent


def stuck_workers(folder: Folder) -> list[str]:
    """One line a worker that had shards in hand at its last word, and that died, was stopped or is silent."""
    lines = []
    for name in folder.list(LOGS):
        last = _last_event(folder, f"{LOGS}/{name}") if name.endswith(".jsonl") else None
        in_hand = last.get("in_hand") if last is not None else None
        if last is None or not isinstance(in_hand, list) or not in_hand:
            continue
        host, _, pid = name.removesuffix(".jsonl").rpartition("-")
        why = _why(host, pid, last)
        if why:
            lines.append(f"{', '.join(map(str, in_hand))}: worker {pid} on {host} {why}")
    return lines


def _why(host: str, pid: str, last: dict[str, Any]) -> str | None:
    if host == socket.gethostname() and pid.isdigit():
        state = _state(int(pid))
        if state in (None, "Z", "X"):
            return "died with it in hand: give the command again"
        if state in ("T", "t"):
            return f"is stopped (SIGSTOP): kill -CONT {pid} lets it go on"
    try:
        age = (datetime.now(timezone.utc) - datetime.fromisoformat(str(last["time"]))).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
    return f"has said nothing for {duration(age)}: a hung device or store?" if age > SILENT else None


def _state(pid: int) -> str | None:
    """Of a process of this host: its letter in /proc, None where there is none; R where the system has no /proc."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "R"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def _last_event(folder: Folder, name: str) -> dict[str, Any] | None:
    """The last whole line of a log, or None."""
    try:
        with folder.open(name) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 4096))
            lines = file.read().splitlines()
    except (AuditError, OSError):
        return None
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None
