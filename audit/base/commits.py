"""The commit protocol: a shard is done when its commit says so, and the commit is written last.

Every stage that fills a folder by shards (scan, refine, trajectories, confirm, mitigate, index) uses this one ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from audit.base.storage import Folder

FORMAT = 1


def table_bytes(table: pa.Table) -> bytes:
    """A table as one Arrow IPC FILE (a torn file fails to open; a torn stream would read as fewer rows)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_table(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read an Arrow IPC file of a stage, all columns or some."""
    with folder.open(name) as file:
        table = pa.ipc.open_file(pa.BufferReader(file.read())).read_all()
    return table if columns is None else table.select(columns)


def shard_name(shard: int) -> str:
    """`000/00042`: a thousand shards a subfolder keeps listings short."""
    return f"{shard // 1000:03d}/{shard:05d}"


def worker_facts() -> dict[str, Any]:
    """Who did it: host, pid and scheduler rank."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "rank": int(os.environ.get("BE_AUDIT_RANK", "0"))}


@dataclass(frozen=True)
class Commit:
    """What a commit file holds: which bytes are the shard's result, and what it took.

    Attributes:
        file: path of the result in the folder; bytes, sha256 and rows describe it.
        counts: rows by status.
        seconds: wall time by step (read, score, write, ...).
    """

    stage: str
    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str
    fingerprint: str
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    finished: str = ""
    format: int = FORMAT


class Ledger:
    """The commits of one stage below one folder (`_commits/STAGE/00000.json`, `_attempts/STAGE/00000.json`).

    Args:
        folder: the run or index folder.
        stage: the stage's name.
        fingerprint: commits made under another fingerprint do not count.
    """

    def __init__(self, folder: Folder, stage: str, fingerprint: str) -> None:
        self.folder, self.stage, self.fingerprint = folder, stage, fingerprint

    def name(self, shard: int) -> str:
        return f"_commits/{self.stage}/{shard:05d}.json"

    def commit(
        self,
        shard: int,
        file: str,
        table: pa.Table,
        counts: dict[str, int] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Commit:
        """Write the shard's table whole, read it back, then write its commit.

        Raises:
            OSError: what was read back is not what was written.
        """
        data = table_bytes(table)
        sha256 = hashlib.sha256(data).hexdigest()
        self.folder.write(file, data)
        back = self.folder.read(file)
        if hashlib.sha256(back).hexdigest() != sha256:
            raise OSError(f"{self.folder.path(file)}: read back other bytes than were written")
        made = Commit(
            stage=self.stage,
            shard=shard,
            file=file,
            rows=table.num_rows,
            bytes=len(data),
            sha256=sha256,
            fingerprint=self.fingerprint,
            counts=counts or {},
            seconds={key: round(value, 4) for key, value in (seconds or {}).items()},
            worker=worker_facts(),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        self.folder.write(self.name(shard), json.dumps(asdict(made), indent=1).encode())
        return made

    def read(self, shard: int) -> Commit | None:
        """The shard's commit, or None when there is none that parses and carries this fingerprint."""
        try:
            content = json.loads(self.folder.read(self.name(shard)))
            made = Commit(**content)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if (made.stage, made.shard, made.fingerprint) != (self.stage, shard, self.fingerprint):
            return None
        return made

    def shards(self) -> list[int]:
        """Shards that have a commit file, readable or not."""
        names = self.folder.list(f"_commits/{self.stage}")
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def done(self, shards: Iterable[int] | None = None) -> dict[int, Commit]:
        """Every valid commit whose file is there with the right size (contents are checked by `problem`)."""
        wanted = self.shards() if shards is None else list(shards)

        def look(shard: int) -> Commit | None:
            made = self.read(shard)
            return made if made and self.problem(made) is None else None

        with ThreadPoolExecutor(1 if self.folder.local else 16) as pool:
            return {made.shard: made for made in pool.map(look, wanted) if made}

    def problem(self, made: Commit, deep: bool = False) -> str | None:
        """What is wrong with a commit's file, in words; None when nothing is. `deep` reads and hashes it."""
        try:
            size = self.folder.size(made.file)
        except FileNotFoundError:
            return f"{made.file}: missing"
        if size != made.bytes:
            return f"{made.file}: {size} bytes where the commit says {made.bytes}"
        if deep:
            data = self.folder.read(made.file)
            if hashlib.sha256(data).hexdigest() != made.sha256:
                return f"{made.file}: contents do not match the commit's sha256"
            rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().num_rows
            if rows != made.rows:
                return f"{made.file}: {rows} rows where the commit says {made.rows}"
        return None

    def drop(self, shard: int) -> None:
        """Take a commit and its attempts back, so that the shard is done again."""
        self.folder.remove(self.name(shard))
        self.forget_attempts(shard)

    def forget_attempts(self, shard: int) -> None:
        """Let a shard be tried as if it never had been."""
        self.folder.remove(f"_attempts/{self.stage}/{shard:05d}.json")

    def tried(self) -> set[int]:
        """Shards with a failed try on record."""
        names = self.folder.list(f"_attempts/{self.stage}")
        return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}

    def attempts(self, shard: int) -> list[dict[str, Any]]:
        """Failed tries of a shard, oldest first."""
        try:
            return list(json.loads(self.folder.read(f"_attempts/{self.stage}/{shard:05d}.json")))
        except (FileNotFoundError, ValueError):
            return []

    def record_attempt(self, shard: int, error: str) -> int:
        """Note a failed try; returns how many there are now."""
        tries = self.attempts(shard)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tries.append({"error": error, "worker": worker_facts(), "time": now})
        self.folder.write(f"_attempts/{self.stage}/{shard:05d}.json", json.dumps(tries, indent=1).encode())
        return len(tries)
