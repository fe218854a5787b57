"""A stage: a pass over rows of a run, sharded and committed. The scan is one like the others."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.commits import Ledger, damaged, table_bytes
from audit.base.committed import Committed
from audit.base.errors import AuditError, Damaged
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import diff_lines, digest
from audit.base.options import config_of
from audit.base.progress import Progress
from audit.base.seal import Seal, read_sealed
from audit.base.stopping import Stop
from audit.engines.launch import EngineConfig, run_shards
from audit.engines.retries import Outcome, Retries
from audit.run.run import FORMAT, Run

Facts = TypeVar("Facts")
ITEMS = "items.arrow"


@dataclass(frozen=True)
class StageKind:
    """What is known of a stage before it is begun.

    Attributes:
        name: of its commits. files: folder of its results. unit: what its rows are, plural.
        opener: dotted name of the function that opens its job in a worker (audit.engines.job).
        resume: dotted name of the function (run, stop) that goes on with it as it was begun, for `verify --repair`.
        check: dotted name of the function (run) that raises where what it needs is not what it was begun with.
        rests_on: the stage it is nothing without.
    """

    name: str
    files: str
    unit: str
    opener: str
    resume: str
    check: str
    rests_on: str | None = None


_SCORES, _CONFIRM, _MITIGATE = "audit.scores.scan", "audit.verdicts.confirm", "audit.mitigation.mitigate"
SCAN = StageKind(
    "scan", "scores", "captions", "audit.scores.scan_shard:open_job", f"{_SCORES}:resume", f"{_SCORES}:check_same"
)
NULL_MAPS = StageKind("null_maps", "null_maps", "captions", "audit.scores.null_maps:open_job", SCAN.resume, SCAN.check)
SECOND_NULL_MAPS = StageKind(
    "second_null_maps", "second_null_maps", "captions", "audit.scores.null_maps:open_second", SCAN.resume, SCAN.check
)
SECOND_LOOK = StageKind(
    "second_look",
    "second_look",
    "captions",
    "audit.scores.second_look:open_job",
    SCAN.resume,
    SCAN.check,
    SECOND_NULL_MAPS.name,
)
REFINE = StageKind(
    "refine", "refined", "trajectories", "audit.scores.trajectories:open_refine", SCAN.resume, SCAN.check
)
TRAJECTORIES = StageKind(
    "trajectories",
    "trajectories",
    "images",
    "audit.scores.trajectories:open_trajectories",
    f"{_CONFIRM}:resume",
    f"{_CONFIRM}:check_same",
)
MATCH = StageKind(
    "match",
    "matched",
    "captions",
    "audit.verdicts.match_shard:open_job",
    TRAJECTORIES.resume,
    TRAJECTORIES.check,
    "trajectories",
)
CONFIRM = StageKind(
    "confirm",
    "confirmed",
    "candidates",
    "audit.verdicts.confirm_shard:open_job",
    TRAJECTORIES.resume,
    TRAJECTORIES.check,
    "trajectories",
)
MITIGATE = StageKind(
    "mitigate",
    "mitigated",
    "images",
    "audit.mitigation.mitigate_shard:open_job",
    f"{_MITIGATE}:resume",
    f"{_MITIGATE}:check_same",
    "confirm",
)
_ALL = (SCAN, NULL_MAPS, SECOND_NULL_MAPS, SECOND_LOOK, REFINE, TRAJECTORIES, MATCH, CONFIRM, MITIGATE)
STAGES = {kind.name: kind for kind in _ALL}
"""Every stage, in the order in which one rests on the other; the scan first, though it reads the null maps."""


@dataclass(frozen=True)
class StageFacts:
    """stages/NAME.json.

    Attributes:
        fingerprint: what its results depend on, the run's digest included.
        generation: made anew whenever the stage is begun: results of a discarded one lie elsewhere and never count.
        digest: hash of both.
        config: flags it was begun with, to go on with.
        sealed: the files it rests on (its items and what else it was begun with), as they were written.
    """

    format: int
    files: str
    fingerprint: dict[str, Any]
    generation: str
    digest: str
    config: dict[str, Any]
    sealed: dict[str, Seal]


class Stage:
    """A stage of a run as it was begun.

    `stages/NAME.json` holds its facts and `stages/NAME-GENERATION/items.arrow` its rows: columns `shard`, `row_id`,
    `caption` and what else the stage needs; those of the scan are run.json and the plan. Results lie in
    FOLDER/GENERATION/000/00000.arrow, those of the scan in scores/000/00000.arrow.

    Attributes:
        run: the run. kind: which stage. facts: stages/NAME.json. ledger: its commits.
    """

    def __init__(self, run: Run, kind: StageKind, facts: StageFacts) -> None:
        self.run, self.kind, self.facts = run, kind, facts
        self.ledger = Ledger(run.folder, kind.name, facts.digest, kind.files, facts.generation, self.still)

    @classmethod
    def find(cls, run: Run, kind: StageKind) -> Stage | None:
        """The stage as it was begun; None where it was not, or rests on another that was begun anew since.

        Raises:
            AuditError: its file cannot be read.
        """
        found = cls._stored(run, kind)
        if found is None or kind.rests_on is None:
            return found
        below = cls.find(run, STAGES[kind.rests_on])
        return found if below is not None and found.rests_on(below) else None

    @classmethod
    def _stored(cls, run: Run, kind: StageKind) -> Stage | None:
        """What stages/NAME.json says, whether or not it is of use."""
        if kind == SCAN:
            made = run.facts
            return cls(run, SCAN, StageFacts(made.format, SCAN.files, {}, "", made.digest, made.config, made.sealed))
        name = f"stages/{kind.name}.json"
        try:
            data = run.folder.read(name)
        except FileNotFoundError:
            return None
        facts = read_facts(StageFacts, data, run.folder.path(name))
        whole = (kind.files, _stage_digest(facts.fingerprint, facts.generation), run.digest)
        if whole != (facts.files, facts.digest, facts.fingerprint.get("run")) or ITEMS not in facts.sealed:
            raise Damaged(
                f"{run.folder.path(name)}: was edited or is of another run: remove it, and begin {kind.name} anew"
            )
        return cls(run, kind, facts)

    @classmethod
    def open(cls, run: Run, kind: StageKind) -> Stage:
        """The stage as it was begun. Raises AuditError when it was not."""
        found = cls.find(run, kind)
        if found is None:
            raise AuditError(f"{run.url}: stage {kind.name} was not begun")
        return found

    @classmethod
    def begun(cls, run: Run) -> list[Stage]:
        """Every stage that was begun, the scan first."""
        return [stage for stage in (cls.find(run, kind) for kind in STAGES.values()) if stage is not None]

    @classmethod
    def begin(
        cls,
        run: Run,
        kind: StageKind,
        fingerprint: Any,
        items: pa.Table,
        config: Any = None,
        replace: bool = False,
        beside: Mapping[str, bytes] | None = None,
    ) -> Stage:
        """Begin a stage, or go on with the same one.

        Args:
            fingerprint: dataclass of what its results depend on beside the run.
            items: its rows, with a column `shard`.
            config: dataclass recorded with it, so that it can be gone on with.
            replace: discard an earlier stage that was begun differently, instead of refusing.
            beside: further files it rests on, name to content, written and sealed with it.

        Raises:
            AuditError: begun before with another fingerprint, with one line a field that differs.
            Damaged: its rows are damaged and cannot be made again.
        """
        whole = {**asdict(fingerprint), "run": run.digest}
        files = {ITEMS: table_bytes(items), **(beside or {})}
        sealed = {name: Seal.of(data) for name, data in files.items()}
        earlier = cls._stored(run, kind)
        if earlier is not None:
            lines = diff_lines(earlier.facts.fingerprint, whole)
            if not lines and earlier._restore(files, sealed, replace):
                return earlier
            if lines and not replace and cls.find(run, kind) is not None:
                raise AuditError(
                    f"{run.url}: {kind.name} was begun differently; nothing was touched. What differs "
                    "(there -> now):\n  "
                    + "\n  ".join(lines[:40])
                    + "\nGive the same flags to go on with it, or --replace to discard it and begin anew."
                )
            earlier.discard()
        recorded, generation = {} if config is None else asdict(config), uuid.uuid4().hex[:8]
        facts = StageFacts(FORMAT, kind.files, whole, generation, _stage_digest(whole, generation), recorded, sealed)
        begun = cls(run, kind, facts)
        for name, data in files.items():
            run.folder.write(begun.place(name), data)
        if not run.folder.create(f"stages/{kind.name}.json", to_json(facts)):  # another process was faster
            run.folder.remove(f"stages/{kind.name}-{generation}")
            return cls.begin(run, kind, fingerprint, items, config, False, beside)
        return begun

    def _restore(self, files: Mapping[str, bytes], sealed: Mapping[str, Seal], replace: bool) -> bool:
        """Write files it rests on again where they are damaged and have come out the same; False: begin it anew."""
        for name, data in files.items():
            place, known = self.place(name), self.facts.sealed.get(name)
            problem = known.problem(self.run.folder, place) if known else None
            if problem and sealed[name] == known:
                self.run.folder.write(place, data)
            elif problem and not replace:
                raise Damaged(f"{self.run.folder.path(problem)}: and cannot be made again: --replace begins it anew")
            elif problem:
                return False
        return True

    def place(self, name: str) -> str:
        """Where a file it was begun with lies."""
        return name if self.kind == SCAN else f"stages/{self.kind.name}-{self.facts.generation}/{name}"

    def still(self) -> None:
        """Raise AuditError once another process has discarded this stage, or the run."""
        self.run.still()
        if self.kind == SCAN:
            return
        now = Stage._stored(self.run, self.kind)
        if now is None or now.facts.digest != self.facts.digest:
            raise AuditError(
                f"{self.run.url}: {self.kind.name} was discarded by another process: nothing more is done here"
            )

    def problems(self) -> list[str]:
        """What is wrong with the files it rests on, one line each."""
        found = (seal.problem(self.run.folder, self.place(name)) for name, seal in self.facts.sealed.items())
        return [problem for problem in found if problem]

    def sealed(self, name: str) -> bytes:
        """A file it was begun with. Raises Damaged where it is not what was written."""
        return read_sealed(self.run.folder, self.place(name), self.facts.sealed.get(name))

    def differs(self, fingerprint: Any) -> bool:
        """Whether it was begun with another fingerprint (dataclass) than this."""
        return self.facts.fingerprint != {**asdict(fingerprint), "run": self.run.digest}

    def rests_on(self, other: Stage) -> bool:
        """Whether its fingerprint names another stage's digest, under that stage's name, as it is now."""
        return bool(self.facts.fingerprint.get(other.kind.name) == other.facts.digest)

    def discard(self) -> None:
        """Remove the stage and every stage that rests on it; the highest first, and of each what makes it a stage."""
        for kind in STAGES.values():
            if kind.rests_on == self.kind.name and (above := Stage._stored(self.run, kind)) is not None:
                above.discard()
        name, generation = self.kind.name, self.facts.generation
        below = (f"_commits/{name}", f"_attempts/{name}", self.kind.files)
        for path in (
            f"stages/{name}.json",
            f"stages/{name}-{generation}",
            *(f"{folder}/{generation}" for folder in below),
        ):
            self.run.folder.remove(path)

    def fingerprint(self, kind: type[Facts]) -> Facts:
        """What its results depend on, as the stage's own dataclass. Raises AuditError where a field is missing."""
        return read_facts(kind, self.facts.fingerprint, self.run.folder.path(f"stages/{self.kind.name}.json"))

    def config(self, kind: type[Facts]) -> Facts:
        """The flags it was begun with."""
        return config_of(kind, self.facts.config)

    def record(self, config: Any) -> None:
        """Keep other flags with it, as where its files lie by now; what it was begun with stays.

        Raises:
            AuditError: discarded by another process.
        """
        self.still()
        self.facts = replace(self.facts, config=asdict(config))
        self.run.folder.write(f"stages/{self.kind.name}.json", to_json(self.facts))

    @functools.cached_property
    def items(self) -> pa.Table:
        """The rows of a later stage. Raises Damaged where their file is not what was written."""
        data = self.sealed(ITEMS)
        with damaged(self.run.folder.path(self.place(ITEMS))):
            return pa.ipc.open_file(pa.BufferReader(data)).read_all()

    @functools.cached_property
    def _planned(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every shard, in order, and its rows; [n] each."""
        if self.kind == SCAN:
            rows = self.run.plan.shards["row_count"].to_numpy()
            return np.arange(len(rows)), rows.astype(np.int64)
        shards, rows = np.unique(self.items["shard"].to_numpy(), return_counts=True)
        return shards.astype(np.int64), rows.astype(np.int64)

    @property
    def shards(self) -> list[int]:
        found: list[int] = self._planned[0].tolist()
        return found

    @property
    def num_rows(self) -> int:
        """Rows of all its shards."""
        return int(self._planned[1].sum())

    def rows_of(self, shards: Iterable[int]) -> int:
        """Rows of some of its shards."""
        planned, rows = self._planned
        return int(rows[np.searchsorted(planned, np.fromiter(shards, np.int64))].sum())

    def rows(self, shard: int) -> pa.Table:
        """The rows of one shard of a later stage, in order."""
        return self.items.filter(pc.equal(self.items["shard"], shard))

    def file(self, shard: int) -> str:
        """Where the results of a shard lie."""
        return self.ledger.file(shard)

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The results of a committed shard, all columns or some. Raises Damaged: not what was committed."""
        return self.ledger.table(shard, columns)

    def done(self) -> Committed:
        """Every valid commit of its shards."""
        return self.ledger.done(self._planned[0])

    def missing(self) -> list[int]:
        """Shards without a valid commit."""
        return self.done().lacking(self._planned[0])

    @property
    def complete(self) -> bool:
        return not self.missing()


def _stage_digest(fingerprint: dict[str, Any], generation: str) -> str:
    return digest({**fingerprint, "generation": generation})


def run_stage(
    stage: Stage,
    todo: Sequence[int],
    config: EngineConfig,
    stop: Stop | None,
    opener: str | None = None,
    rows_before: int | None = None,
) -> Outcome:
    """Run shards of a stage on the engine the configuration names.

    Shards given up earlier are tried again: whoever types the command again wants that.

    Args:
        stage: as it was begun. todo: shards to do, in order. config: engine, device and limits. stop: asks to stop.
        opener: of the job, instead of the stage's own. rows_before: done already; looked for where it is not known.

    Raises:
        AuditError: bad input. Drained: `stop` asked to. Broken: every worker failed shard after shard.
    """
    stage.run.folder.sweep()
    if not todo:
        return Outcome()
    for shard in stage.ledger.tried() & set(todo):
        if len(stage.ledger.attempts(shard)) >= config.max_shard_retries:
            stage.ledger.forget_attempts(shard)
    before = rows_before if rows_before is not None else stage.rows_of(np.setdiff1d(stage.done().shards, todo))
    total = before + stage.rows_of(todo)
    with Progress(total, stage.kind.unit, stage.kind.name, before) as progress:
        retries = Retries(stage.ledger, todo, config.max_shard_retries, progress)
        outcome = run_shards(opener or stage.kind.opener, stage.run.url, config, retries, progress, stop or Stop())
    stage.still()
    return outcome
