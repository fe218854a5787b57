"""A stage: a pass over rows of a run, sharded and committed. The scan is one like the others."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Commit, Ledger, read_table, shard_name, table_bytes
from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import diff_lines, digest
from audit.base.options import config_of
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.captions.streams import reading
from audit.engines.launch import EngineConfig, run_shards
from audit.engines.retries import Outcome, Retries
from audit.run.run import FORMAT, Run

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class StageKind:
    """What is known of a stage before it is begun.

    Attributes:
        name: of its commits. files: folder of its results. unit: what its rows are, plural.
        opener: dotted name of the function that opens its job in a worker (audit.engines.job).
        resume: dotted name of the function (run, stop) that goes on with it as it was begun, for `verify --repair`.
    """

    name: str
    files: str
    unit: str
    opener: str
    resume: str


SCAN = StageKind("scan", "scores", "captions", "audit.scores.scan_shard:open_job", "audit.scores.scan:resume")
REFINE = StageKind("refine", "refined", "trajectories", "audit.scores.trajectories:open_refine", SCAN.resume)
TRAJECTORIES = StageKind(
    "trajectories",
    "trajectories",
    "images",
    "audit.scores.trajectories:open_trajectories",
    "audit.verdicts.confirm:resume",
)
MATCH = StageKind("match", "matched", "captions", "audit.verdicts.match_shard:open_job", TRAJECTORIES.resume)
CONFIRM = StageKind(
    "confirm", "confirmed", "candidates", "audit.verdicts.confirm_shard:open_job", "audit.verdicts.confirm:resume"
)
MITIGATE = StageKind(
    "mitigate",
    "mitigated",
    "images",
    "audit.mitigation.mitigate_shard:open_job",
    "audit.mitigation.mitigate:resume",
)
STAGES = {kind.name: kind for kind in (SCAN, REFINE, TRAJECTORIES, MATCH, CONFIRM, MITIGATE)}
"""Every stage, in the order in which one rests on the other."""


@dataclass(frozen=True)
class StageFacts:
    """stages/NAME.json.

    Attributes:
        fingerprint: what its results depend on, the run's digest included; digest: its hash.
        config: flags it was begun with, to go on with.
    """

    format: int
    files: str
    fingerprint: dict[str, Any]
    digest: str
    config: dict[str, Any]


class Stage:
    """A stage of a run as it was begun.

    `stages/NAME.json` holds its facts and `stages/NAME.arrow` its rows: columns `shard`, `row_id`, `caption` and what
    else the stage needs; those of the scan are run.json and the plan. Results lie in FOLDER/000/00000.arrow.

    Attributes:
        run: the run. kind: which stage. facts: stages/NAME.json. ledger: its commits.
    """

    def __init__(self, run: Run, kind: StageKind, facts: StageFacts) -> None:
        self.run, self.kind, self.facts = run, kind, facts
        self.ledger = Ledger(run.folder, kind.name, facts.digest)

    @classmethod
    def find(cls, run: Run, kind: StageKind) -> Stage | None:
        """The stage as it was begun, or None.

        Raises:
            AuditError: its file cannot be read.
        """
        if kind == SCAN:
            made = run.facts
            return cls(run, SCAN, StageFacts(made.format, SCAN.files, {}, made.digest, made.config))
        name = f"stages/{kind.name}.json"
        try:
            data = run.folder.read(name)
        except FileNotFoundError:
            return None
        return cls(run, kind, read_facts(StageFacts, data, run.folder.path(name)))

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
    ) -> Stage:
        """Begin a stage, or go on with the same one.

        Args:
            fingerprint: dataclass of what its results depend on beside the run.
            items: its rows, with a column `shard`.
            config: dataclass recorded with it, so that it can be gone on with.
            replace: discard an earlier stage that was begun differently, instead of refusing.

        Raises:
            AuditError: begun before with another fingerprint, with one line a field that differs.
        """
        whole = {**asdict(fingerprint), "run": run.digest}
        earlier = cls.find(run, kind)
        if earlier is not None:
            lines = diff_lines(earlier.facts.fingerprint, whole)
            if not lines:
                return earlier
            if not replace:
                raise AuditError(
                    f"{run.url}: {kind.name} was begun differently; nothing was touched. What differs (run -> now):\n  "
                    + "\n  ".join(lines[:40])
                    + "\nGive the same flags to go on with it, or --replace to discard it and begin anew."
                )
            earlier.discard()
        run.folder.write(f"stages/{kind.name}.arrow", table_bytes(items))
        recorded = {} if config is None else asdict(config)
        facts = StageFacts(FORMAT, kind.files, whole, digest(whole), recorded)
        run.folder.write(f"stages/{kind.name}.json", to_json(facts))
        return cls(run, kind, facts)

    def differs(self, fingerprint: Any) -> bool:
        """Whether it was begun with another fingerprint (dataclass) than this."""
        return self.facts.fingerprint != {**asdict(fingerprint), "run": self.run.digest}

    def rests_on(self, other: Stage) -> bool:
        """Whether its fingerprint names another stage's digest, under that stage's name, as it is now."""
        return bool(self.facts.fingerprint.get(other.kind.name) == other.facts.digest)

    def discard(self) -> None:
        """Remove the stage, its commits first."""
        name = self.kind.name
        for path in (f"stages/{name}.json", f"_commits/{name}", f"_attempts/{name}", self.kind.files):
            self.run.folder.remove(path)

    def fingerprint(self, kind: type[Facts]) -> Facts:
        """What its results depend on, as the stage's own dataclass. Raises AuditError where a field is missing."""
        return read_facts(kind, self.facts.fingerprint, self.run.folder.path(f"stages/{self.kind.name}.json"))

    def config(self, kind: type[Facts]) -> Facts:
        """The flags it was begun with."""
        return config_of(kind, self.facts.config)

    @functools.cached_property
    def items(self) -> pa.Table:
        """The rows of a later stage. Raises AuditError when their file is damaged."""
        name = f"stages/{self.kind.name}.arrow"
        with reading(self.run.folder.path(name)):
            return read_table(self.run.folder, name)

    @functools.cached_property
    def rows_by_shard(self) -> dict[int, int]:
        """Rows of every shard, by shard."""
        if self.kind == SCAN:
            return dict(enumerate(self.run.plan.shards["row_count"].to_pylist()))
        return dict(sorted(collections.Counter(self.items["shard"].to_pylist()).items()))

    @property
    def shards(self) -> list[int]:
        return list(self.rows_by_shard)

    def rows(self, shard: int) -> pa.Table:
        """The rows of one shard of a later stage, in order."""
        return self.items.filter(pc.equal(self.items["shard"], shard))

    def file(self, shard: int) -> str:
        """Where the results of a shard lie."""
        return f"{self.kind.files}/{shard_name(shard)}.arrow"

    def done(self) -> dict[int, Commit]:
        """Every valid commit of its shards."""
        return self.ledger.done(self.shards)

    def missing(self) -> list[int]:
        """Shards without a valid commit."""
        done = self.done()
        return [shard for shard in self.shards if shard not in done]

    @property
    def complete(self) -> bool:
        return not self.missing()


def run_stage(stage: Stage, todo: Sequence[int], config: EngineConfig, stop: Stop | None) -> Outcome:
    """Run shards of a stage on the engine the configuration names.

    Shards given up earlier are tried again: whoever types the command again wants that.

    Args:
        stage: as it was begun. todo: shards to do, in order. config: engine, device and limits. stop: asks to stop.

    Raises:
        AuditError: bad input. Drained: `stop` asked to. Broken: every worker failed shard after shard.
    """
    stage.run.folder.sweep()
    if not todo:
        return Outcome()
    for shard in stage.ledger.tried() & set(todo):
        if len(stage.ledger.attempts(shard)) >= config.max_shard_retries:
            stage.ledger.forget_attempts(shard)
    rows = stage.rows_by_shard
    before = sum(rows[shard] for shard in set(stage.done()) - set(todo))
    total = before + sum(rows[shard] for shard in todo)
    with Progress(total, stage.kind.unit, stage.kind.name, before) as progress:
        retries = Retries(stage.ledger, todo, config.max_shard_retries, progress)
        return run_shards(stage.kind.opener, stage.run.url, config, retries, progress, stop or Stop())


def sum_counts(commits: Iterable[Commit]) -> dict[str, int]:
    """Rows by status over commits."""
    total: collections.Counter[str] = collections.Counter()
    for made in commits:
        total.update(made.counts)
    return dict(total)


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        counts: rows by status (ok, error, empty, duplicate), of the committed shards.
        seconds: by step, summed over workers.
        quarantined: shards whose last try failed and that have no commit; errors: why, by shard.
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
    errors: dict[str, str] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def complete(self) -> bool:
        return self.done == self.shards

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate."""
        left = self.rows - self.rows_done
        return left / self.rate if self.rate and left else None


def stage_status(stage: Stage, max_failed: int = 1) -> StageStatus:
    """Status of a stage from its commits alone.

    Args:
        stage: as it was begun. max_failed: failed tries that make a shard quarantined.
    """
    done = stage.done()
    seconds: dict[str, float] = {}
    for made in done.values():
        for step, took in made.seconds.items():
            seconds[step] = seconds.get(step, 0.0) + took
    attempts = {shard: stage.ledger.attempts(shard) for shard in sorted(stage.ledger.tried() - set(done))}
    failed = [shard for shard, tries in attempts.items() if len(tries) >= max_failed]
    return StageStatus(
        stage=stage.kind.name,
        shards=len(stage.shards),
        done=len(done),
        rows=sum(stage.rows_by_shard.values()),
        rows_done=sum(made.rows for made in done.values()),
        counts=sum_counts(done.values()),
        seconds=seconds,
        quarantined=failed,
        errors={str(shard): str(attempts[shard][-1]["error"]) for shard in failed},
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
