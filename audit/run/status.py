"""`be-audit status`: how far every stage of a run is, from commits alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from audit.base.committed import Committed
from audit.base.text import duration
from audit.run.run import Run
from audit.run.stage import REFINE, SCAN, SECOND_LOOK, SECOND_NULL_MAPS, STAGES, Stage
from audit.run.workers import stuck_workers


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


@dataclass(frozen=True)
class RunStatus:
    """How far a run is: rows and distinct captions planned, every stage that was begun, workers that stand still,
    and what no stage tells of (`not_begun`)."""

    run: str
    model: str
    rows: int
    unique: int
    stages: list[StageStatus]
    stuck: list[str]
    not_begun: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.not_begun and all(stage.complete for stage in self.stages)

    @property
    def exit_code(self) -> int:
        """3 when shards were given up, else 0."""
        return 3 if any(stage.quarantined for stage in self.stages) else 0

    def to_dict(self) -> dict[str, Any]:
        """As one JSON-able object, with what follows from the numbers."""
        stages = [{**asdict(stage), "complete": stage.complete, "eta_seconds": stage.eta} for stage in self.stages]
        return {**asdict(self), "stages": stages}

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.run}: {self.rows:,} rows, {self.unique:,} unique captions, model {self.model}"]
        for stage in self.stages:
            counts = ", ".join(f"{value:,} {key}" for key, value in stage.counts.items() if value)
            line = f"{stage.stage:<13} {stage.done}/{stage.shards} shards, "
            line += f"{stage.rows_done:,}/{stage.rows:,} rows"
            if counts:
                line += f" ({counts})"
            if stage.rate and not stage.complete:
                line += f", {stage.rate:.1f} rows/s"
            if stage.eta:
                line += f", about {duration(stage.eta)} left"
            lines.append(line)
            took = {key: value for key, value in stage.seconds.items() if key != "wall"}
            if took and stage.seconds.get("wall"):
                shares = ", ".join(f"{key} {duration(value)}" for key, value in took.items())
                lines.append(f"{'':<13} {shares}; {duration(stage.seconds['wall'])} in all")
            lines += [f"{'':<13} shard {shard} given up: {error}" for shard, error in stage.errors.items()]
        return [*lines, *self.not_begun.values(), *(f"stuck: {line}" for line in self.stuck)]


def run_status(url: str) -> RunStatus:
    """Status of a run.

    Raises:
        AuditError: no run there.
    """
    run = Run.open(url)
    tries = run.facts.config.get("max_shard_retries")
    tries = tries if isinstance(tries, int) else 3
    stages = [stage_status(stage, tries) for stage in Stage.begun(run)]
    stuck = [] if all(stage.complete for stage in stages) else stuck_workers(run.folder)
    scanned = next(stage for stage in stages if stage.stage == SCAN.name)
    missing = not_begun(run, scanned)
    return RunStatus(url, run.facts.model, run.facts.rows, run.facts.unique, stages, stuck, missing)


def not_begun(run: Run, scanned: StageStatus | None = None) -> dict[str, str]:
    """What is missing of a run that no stage tells of, stage to words; {} where all is well.

    Stages that its scan was asked for and has not come to, and those whose own file is lost, or rests on a stage that
    was begun anew: nobody reads their results.

    Args:
        scanned: status of the scan, where it is known already.
    """
    missing = [kind for kind in STAGES.values() if kind != SCAN and Stage.find(run, kind) is None]
    there, lines = run.folder.list("stages"), dict[str, str]()
    for kind in missing:
        name, file = kind.name, f"stages/{kind.name}.json"
        made = [each.removeprefix(f"{name}-") for each in there if each.startswith(f"{name}-")]
        if f"{name}.json" in there:
            lines[name] = f"{file}: rests on a stage that was begun anew: give its command again"
        elif any(run.folder.list(f"_commits/{name}/{generation}") for generation in made):
            lines[name] = f"{file}: missing, while results of that stage are there: give its command again"
    asked = run.facts.config
    looks = asked.get("second_look") and asked.get("second_look_noises", 0) > run.fingerprint.num_noises
    wanted = {SECOND_LOOK: bool(looks), REFINE: bool(asked.get("refine"))}
    waiting = [kind for kind in wanted if kind in missing and kind.name not in lines]
    begun = SECOND_NULL_MAPS not in missing  # the maps of a second look
    if begun and SECOND_LOOK in waiting:
        lines[SECOND_LOOK.name] = f"{SECOND_LOOK.name}: not begun yet"
    if any(wanted[kind] for kind in waiting):
        scanned = scanned or stage_status(Stage.open(run, SCAN))
        if scanned.complete and scanned.counts.get("ok"):  # or it has not come to that
            lines |= {kind.name: f"{kind.name}: not begun yet" for kind in waiting if wanted[kind]}
    return lines


def stage_status(stage: Stage, max_failed: int = 1) -> StageStatus:
    """Status of a stage from its commits alone.

    Args:
        stage: as it was begun. max_failed: failed tries that make a shard quarantined.
    """
    done = stage.done()
    attempts = {shard: stage.ledger.attempts(shard) for shard in done.lacking(sorted(stage.ledger.tried()))}
    failed = [shard for shard, tries in attempts.items() if len(tries) >= max(max_failed, 1)]
    return StageStatus(
        stage=stage.kind.name,
        shards=len(stage.shards),
        done=len(done),
        rows=stage.num_rows,
        rows_done=done.rows,
        counts=done.counts,
        seconds=done.seconds,
        quarantined=failed,
        errors={str(shard): attempts[shard][-1].error for shard in failed},
        rate=_rate(done),
    )


def _rate(done: Committed) -> float:
    """Rows a second over the last 10 minutes of work: rows over the time in which at least one worker was busy."""
    ends, rows = done.finished(), done.table["rows"].to_numpy()
    starts = ends - np.ma.filled(done.took("wall"), 0.0)
    recent = np.flatnonzero(ends > ends.max(initial=0.0) - 600)
    recent = recent[np.lexsort((ends[recent], starts[recent]))]
    starts, ends = starts[recent], ends[recent]
    until = np.maximum.accumulate(np.concatenate([[0.0], ends]))[:-1]  # when the last of those before had ended
    busy = float(np.maximum(0.0, ends - np.maximum(starts, until)).sum())
    return sum(rows[recent].tolist()) / busy if busy > 0 else 0.0
