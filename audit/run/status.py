"""`be-audit status`: how far every stage of a run is, from commits alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from audit.base.text import duration
from audit.run.run import Run
from audit.run.stage import Stage, StageStatus, stage_status
from audit.run.workers import stuck_workers


@dataclass(frozen=True)
class RunStatus:
    """How far a run is: rows and distinct captions planned, every stage that was begun, workers that stand still."""

    run: str
    model: str
    rows: int
    unique: int
    stages: list[StageStatus]
    stuck: list[str]

    @property
    def complete(self) -> bool:
        return all(stage.complete for stage in self.stages)

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
        return [*lines, *(f"stuck: {line}" for line in self.stuck)]


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
    return RunStatus(url, run.facts.model, run.facts.rows, run.facts.unique, stages, stuck)
