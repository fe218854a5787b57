"""The run folder: what an audit was asked to do and with what; written once, before any work."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import digest, refuse_other
from audit.base.ours import is_run_name
from audit.base.seal import Seal
from audit.base.storage import Folder, check_kept, join
from audit.captions import CaptionPlan, PlanFacts

FORMAT = 3
DEFAULT_RUN = "be-audit-run"
PLANNED = ("plan.arrow", "duplicates.arrow", "input")
"""What planning writes, before run.json makes the folder a run."""
_CLAIMS, _BEFORE = "_claims", {"logs"}


@dataclass(frozen=True)
class ModelFacts:
    """Which weights.

    Attributes:
        weights_sha256: over every file that is loaded. revision: the hub's commit where they came from there.
        lora, textual_inversion: hashes of what is added to them, with scale or token, in order.
        clean_captions: its pipeline cleans captions and this machine has what it cleans them with (bs4 and ftfy).
    """

    weights_sha256: str
    revision: str | None = None
    lora: list[str] = field(default_factory=list)
    textual_inversion: list[str] = field(default_factory=list)
    clean_captions: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes a score, and nothing that does not (docs/run-folder.md).

    Attributes:
        inputs: what identifies each caption file. scheduler: configuration of the model's scheduler.
        rows_per_shard, dtype: as resolved, never `auto`. store_masks: none, bits or float16.
        mask: first or final, or none for a model without a readable one.
        unit: what scores are differences of: epsilon (noise predictions) or velocity. The others are flags of scan.
    """

    formula_version: int
    inputs: list[dict[str, str | int | None]]
    limit: int | None
    rows_per_shard: int
    keep_cols: list[str] | None
    model: ModelFacts
    scheduler: dict[str, Any]
    dtype: str
    steps: int
    guidance_scale: float
    seed: int
    num_noises: int
    mask: str
    mask_token: str
    mask_layers: list[str]
    store_masks: str
    extra_evaluation: bool
    unit: str = "epsilon"

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all fields."""
        return digest(asdict(self))


@dataclass(frozen=True)
class RunFacts:
    """run.json.

    Attributes:
        created: when, ISO 8601. model: as it was named, a local folder by its absolute path. revision: as it was asked.
        config: flags of the scan, to go on with. fingerprint: what the scores depend on; digest: its hash.
        rows, unique, empty, shards: of the plan. versions: of packages, recorded only.
        sealed: the plan, the duplicates and the staged inputs, as they were written.
        captions: what was found of the inputs and what was left out, recorded only.
    """

    format: int
    created: str
    model: str
    revision: str | None
    config: dict[str, Any]
    fingerprint: Fingerprint
    digest: str
    rows: int
    unique: int
    empty: int
    shards: int
    versions: dict[str, str]
    sealed: dict[str, Seal]
    captions: PlanFacts = field(default_factory=PlanFacts)


class Run:
    """A run folder with its run.json read.

    Attributes:
        folder: the folder, local or remote. facts: run.json.
    """

    def __init__(self, folder: Folder, facts: RunFacts) -> None:
        self.folder, self.facts = folder, facts

    @classmethod
    def open(cls, url: str) -> Run:
        """Open an existing run.

        Raises:
            AuditError: no run there, one of another format, or a run.json that cannot be read.
        """
        run = cls.find(Folder(url))
        if run is None:
            raise AuditError(f"{url}: no run here (no run.json): make one with `be-audit scan CAPTIONS -o {url}`")
        return run

    @classmethod
    def find(cls, folder: Folder) -> Run | None:
        """The run in a folder, or None. Raises AuditError as `open` does."""
        try:
            data = folder.read("run.json")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # no permission, no credentials: every file system driver has its own types
            raise AuditError(f"{folder.url}: cannot be read: {error}") from error
        _check_format(folder, data)
        facts = read_facts(RunFacts, data, folder.path("run.json"))
        if facts.digest != facts.fingerprint.digest or "plan.arrow" not in facts.sealed:
            raise AuditError(f"{folder.path('run.json')}: was edited: digest is not that of fingerprint: restore it")
        return cls(folder, facts)

    @classmethod
    def create(
        cls,
        folder: Folder,
        config: dict[str, Any],
        fingerprint: Fingerprint,
        plan: CaptionPlan,
        model: str,
        revision: str | None = None,
    ) -> Run:
        """Save the plan, then run.json, which makes the folder a run. Arguments as in RunFacts.

        Raises:
            AuditError: another process made a different run here meanwhile.
        """
        sealed = plan.save(folder)
        facts = RunFacts(
            format=FORMAT,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=model,
            revision=revision,
            config=config,
            fingerprint=fingerprint,
            digest=fingerprint.digest,
            rows=plan.num_rows,
            unique=plan.num_unique,
            empty=plan.num_empty,
            shards=len(plan),
            versions=versions(),
            sealed=sealed,
            captions=plan.facts,
        )
        if not folder.create("run.json", to_json(facts)):  # one planner took another for dead
            run = cls.open(folder.url)
            run.check_same(fingerprint)
            return run
        return cls(folder, facts)

    def record(self, **flags: Any) -> None:
        """Keep flags of the scan that a later command gave otherwise, to go on with those."""
        self.still()
        self.facts = replace(self.facts, config={**self.facts.config, **flags})
        self.folder.write("run.json", to_json(self.facts))

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def fingerprint(self) -> Fingerprint:
        return self.facts.fingerprint

    @property
    def digest(self) -> str:
        return self.facts.digest

    @functools.cached_property
    def plan(self) -> CaptionPlan:
        """Files, shards and duplicates. Raises Damaged where it is not what run.json has sealed."""
        plan = CaptionPlan.load(self.folder, self.facts.sealed["plan.arrow"])
        facts = self.facts
        counts = (plan.num_rows, plan.num_unique, plan.num_empty, len(plan))
        if counts != (facts.rows, facts.unique, facts.empty, facts.shards):
            raise AuditError(f"{self.folder.path('run.json')}: was edited: its counts are not the plan's: restore it")
        return plan

    def check_same(self, fingerprint: Fingerprint) -> None:
        """Refuse to go on under another fingerprint.

        Raises:
            AuditError: with one line a field that differs.
        """
        refuse_other(self.folder.url, asdict(self.fingerprint), asdict(fingerprint), "holds a different run")

    def still(self) -> None:
        """Raise AuditError where the folder holds another run by now."""
        now = Run.find(self.folder)
        if now is None or (now.digest, now.facts.created) != (self.digest, self.facts.created):
            raise AuditError(f"{self.url}: the run was removed or replaced by another process")


def _check_format(folder: Folder, data: bytes) -> None:
    """Refuse another version's run by name: its columns mean something else."""
    try:
        format = json.loads(data)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AuditError(f"{folder.path('run.json')}: cannot be read: restore it or use another folder") from error
    if format != FORMAT:
        raise AuditError(
            f"{folder.url}: a run of format {format}, made by another version of be-audit; this one reads {FORMAT}: "
            "scan again into a new folder (-o), or read the old one with the version that made it"
        )


def check_output(folder: Folder, inputs: Sequence[str] = ()) -> None:
    """Refuse a folder that holds something else than a run and, perhaps, its inputs.

    Args:
        folder: of the run. inputs: absolute paths or URLs of caption files.

    Raises:
        AuditError: a file, a folder with other things in it, or one that cannot be written.
    """
    if folder.local and folder.fs.isfile(folder.root):
        raise AuditError(f"-o {folder.url}: is a file; give a folder")
    start = f"{os.path.realpath(folder.root)}/" if folder.local else f"{folder.url}/"
    given = {path[len(start) :].partition("/")[0] for path in inputs if path.startswith(start)}
    given = {name for name in given if not is_run_name(name)}
    there = [name for name in folder.list() if not name.startswith(".") and name not in given]
    ours = _BEFORE | ({_CLAIMS, *PLANNED} if _CLAIMS in there else set())  # a plan in progress, or one that was killed
    if there and "run.json" not in there and not set(there) <= ours:
        raise AuditError(
            f"-o {folder.url}: the folder is not empty and not a run (it has {there[0]}): "
            f"give a new one, for example -o {join(folder.url, DEFAULT_RUN)}"
        )
    check_writable(folder)


def check_writable(folder: Folder) -> None:
    """Raise AuditError where nothing can be written or kept, before work is spent on what should go there."""
    check_kept(folder)
    name = f".writable.{uuid.uuid4().hex[:8]}"  # others may be looking at the same time
    folder.write(name, b"")
    folder.remove(name)


def versions() -> dict[str, str]:
    """Versions that a result may depend on; recorded, not fingerprinted."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("be-audit", "torch", "diffusers", "transformers", "pyarrow", "faiss-cpu", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
