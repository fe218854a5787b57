"""The run folder: what an audit was asked to do, which of its shards are done, and whether they are whole."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from audit.captions import CaptionPlan
from audit.captions.streams import reading
from audit.commits import Commit, Ledger, read_table, shard_name, table_bytes
from audit.errors import AuditError
from audit.fingerprint import diff_lines, digest
from audit.storage import Folder

FORMAT = 1
DEFAULT_RUN = "be-audit-run"
_OURS = {"plan.arrow", "duplicates.arrow", "input", "run.json", "logs"}


class Run:
    """A run folder with its run.json read.

    Attributes:
        folder: the folder, local or remote.
        facts: run.json: configuration, fingerprint, versions.
    """

    def __init__(self, folder: Folder, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    @classmethod
    def open(cls, url: str) -> Run:
        """Open an existing run.

        Raises:
            AuditError: no run there, or a run.json that does not parse.
        """
        run = cls.find(Folder(url))
        if run is None:
            raise AuditError(f"{url}: no run here (no run.json): make one with `be-audit scan CAPTIONS -o {url}`")
        return run

    @classmethod
    def find(cls, folder: Folder) -> Run | None:
        """The run in a folder, or None."""
        try:
            facts = json.loads(folder.read("run.json"))
            if facts["format"] != FORMAT:
                raise AuditError(f"{folder.url}: run format {facts['format']}, this version reads {FORMAT}")
            return cls(folder, facts)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AuditError(f"{folder.path('run.json')}: cannot be read: restore it or use another folder") from error
        except AuditError:
            raise
        except Exception as error:  # no permission, no credentials: every file system driver has its own types
            raise AuditError(f"{folder.url}: cannot be read: {error}") from error

    @classmethod
    def create(cls, folder: Folder, config: dict[str, Any], fingerprint: dict[str, Any], plan: CaptionPlan) -> Run:
        """Save the plan, then run.json, which makes the folder a run."""
        plan.save(folder)
        facts = {
            "format": FORMAT,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "config": config,
            "fingerprint": fingerprint,
            "digest": digest(fingerprint),
            "rows": plan.num_rows,
            "unique": plan.num_unique,
            "empty": plan.num_empty,
            "shards": len(plan),
            "versions": versions(),
        }
        folder.write("run.json", json.dumps(facts, indent=1).encode())
        return cls(folder, facts)

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts["config"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self.facts["fingerprint"])

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])

    @functools.cached_property
    def plan(self) -> CaptionPlan:
        """Files, shards and duplicates."""
        return CaptionPlan.load(self.folder)

    @functools.cached_property
    def scan(self) -> Ledger:
        """Commits of the scan."""
        return Ledger(self.folder, "scan", self.digest)

    def check_same(self, fingerprint: dict[str, Any]) -> None:
        """Refuse to go on under another fingerprint.

        Raises:
            AuditError: with one line a field that differs.
        """
        lines = diff_lines(self.fingerprint, fingerprint)
        if lines:
            raise AuditError(
                f"{self.url}: holds a different run; nothing was touched. What differs (run -> now):\n  "
                + "\n  ".join(lines[:40])
                + "\nGive the same flags and files to go on with it, or another -o for a new run."
            )


def check_output(folder: Folder) -> None:
    """Refuse a folder that holds something else than a run.

    Raises:
        AuditError: a file, a folder with other things in it, or one that cannot be written.
    """
    if folder.local and folder.fs.isfile(folder.root):
        raise AuditError(f"-o {folder.url}: is a file; give a folder")
    there = [name for name in folder.list() if not name.startswith(".")]
    if there and "run.json" not in there and not set(there) <= _OURS:
        raise AuditError(f"-o {folder.url}: the folder is not empty and not a run (it has {there[0]}); give a new one")
    check_writable(folder)


def check_writable(folder: Folder) -> None:
    """Raise AuditError where nothing can be written, before work is spent on what should go there."""
    folder.write(".writable", b"")
    folder.remove(".writable")


def score_file(shard: int) -> str:
    return f"scores/{shard_name(shard)}.arrow"


def versions() -> dict[str, str]:
    """Versions that a result may depend on; recorded, not fingerprinted."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("be-audit", "torch", "diffusers", "transformers", "pyarrow", "faiss-cpu", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Stage:
    """A later pass over some rows of a run (refine, trajectories, confirm, mitigate), sharded and committed.

    `stages/NAME.json` holds its fingerprint and `stages/NAME.arrow` its rows: columns `shard`, `row_id`, `caption`
    and what else the stage needs. Results lie in FOLDER/000/00000.arrow.

    Args:
        run: the run. name: the stage's. files: folder of its results. facts: stages/NAME.json.
    """

    def __init__(self, run: Run, name: str, files: str, facts: dict[str, Any]) -> None:
        self.run, self.name, self.files, self.facts = run, name, files, facts
        self.ledger = Ledger(run.folder, name, str(facts["digest"]))

    @classmethod
    def find(cls, run: Run, name: str) -> Stage | None:
        """The stage as it was begun, or None."""
        try:
            facts = json.loads(run.folder.read(f"stages/{name}.json"))
            return cls(run, name, str(facts["files"]), facts)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AuditError(f"{run.folder.path(f'stages/{name}.json')}: cannot be read: {error}") from error

    @classmethod
    def begin(
        cls,
        run: Run,
        name: str,
        files: str,
        fingerprint: dict[str, Any],
        items: pa.Table,
        replace: bool = False,
        config: dict[str, Any] | None = None,
    ) -> Stage:
        """Begin a stage, or go on with the same one.

        Args:
            items: its rows, with a column `shard`.
            replace: discard an earlier stage that was begun differently, instead of refusing.
            config: recorded with it, so that it can be gone on with.

        Raises:
            AuditError: begun before with another fingerprint, with one line a field that differs.
        """
        whole = {**fingerprint, "run": run.digest}
        earlier = cls.find(run, name)
        if earlier is not None:
            lines = diff_lines(earlier.facts["fingerprint"], whole)
            if not lines:
                return earlier
            if not replace:
                raise AuditError(
                    f"{run.url}: {name} was begun differently; nothing was touched. What differs (run -> now):\n  "
                    + "\n  ".join(lines[:40])
                    + "\nGive the same flags to go on with it, or --replace to discard it and begin anew."
                )
            earlier.discard()
        run.folder.write(f"stages/{name}.arrow", table_bytes(items))
        facts = {"format": FORMAT, "files": files, "fingerprint": whole, "digest": digest(whole)}
        facts["config"] = config or {}
        run.folder.write(f"stages/{name}.json", json.dumps(facts, indent=1).encode())
        return cls(run, name, files, facts)

    def discard(self) -> None:
        """Remove the stage, its commits first."""
        for name in (f"stages/{self.name}.json", f"_commits/{self.name}", f"_attempts/{self.name}", self.files):
            self.run.folder.remove(name)

    @functools.cached_property
    def items(self) -> pa.Table:
        """The stage's rows. Raises AuditError when their file is damaged."""
        name = f"stages/{self.name}.arrow"
        with reading(self.run.folder.path(name)):
            return read_table(self.run.folder, name)

    @property
    def shards(self) -> list[int]:
        return sorted(set(self.items["shard"].to_pylist()))

    def rows(self, shard: int) -> pa.Table:
        """The rows of one shard, in order."""
        return self.items.filter(pc.equal(self.items["shard"], shard))

    def file(self, shard: int) -> str:
        return f"{self.files}/{shard_name(shard)}.arrow"

    @property
    def complete(self) -> bool:
        return set(self.ledger.done(self.shards)) == set(self.shards)


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        counts: rows by status (ok, error, empty, duplicate), of the committed shards.
        seconds: by step, summed over workers.
        quarantined: shards whose last try failed and that have no commit.
        rate: rows a second over all workers, from the commits of the last 10 minutes of work; 0 when unknown.
    """

    stage: str
    shards: int
    done: int
    rows: int
    rows_done: int
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    quarantined: list[int] = field(default_factory=list)
    rate: float = 0.0

    @property
    def complete(self) -> bool:
        return self.done == self.shards

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate."""
        left = self.rows - self.rows_done
        return left / self.rate if self.rate and left else None


def stage_status(ledger: Ledger, planned: dict[int, int], max_failed: int = 1) -> StageStatus:
    """Status of a stage from its commits alone.

    Args:
        ledger: the stage's. planned: rows by shard. max_failed: failed tries that make a shard quarantined.
    """
    done = ledger.done(planned)
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for made in done.values():
        for key, value in made.counts.items():
            counts[key] = counts.get(key, 0) + value
        for key, took in made.seconds.items():
            seconds[key] = seconds.get(key, 0.0) + took
    failed = [shard for shard in sorted(ledger.tried() - set(done)) if len(ledger.attempts(shard)) >= max_failed]
    return StageStatus(
        stage=ledger.stage,
        shards=len(planned),
        done=len(done),
        rows=sum(planned.values()),
        rows_done=sum(made.rows for made in done.values()),
        counts=counts,
        seconds=seconds,
        quarantined=failed,
        rate=_rate(done.values()),
    )


def _rate(commits: Iterable[Commit]) -> float:
    """Rows a second over the last 10 minutes of work: rows over the time in which at least one worker was busy."""
    spans = []
    for made in commits:
        end = datetime.fromisoformat(made.finished).timestamp()
        spans.append((end - made.seconds.get("wall", 0.0), end, made.rows))
    newest = max((end for _, end, _ in spans), default=0.0)
    rows, busy, until = 0, 0.0, 0.0
    for start, end, count in sorted(span for span in spans if span[1] > newest - 600):
        rows += count
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return rows / busy if busy > 0 else 0.0
