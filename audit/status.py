"""`be-audit status`: how far every stage of a run is, from commits alone."""

from __future__ import annotations

import collections
from dataclasses import asdict
from typing import Any

from audit.run import Run, Stage, StageStatus, stage_status

STAGES = ("refine", "trajectories", "confirm", "mitigate")


def run_status(url: str) -> dict[str, Any]:
    """Status of a run as one JSON-able dict.

    Raises:
        AuditError: no run there.
    """
    run = Run.open(url)
    tries = int(run.config.get("max_shard_retries", 3))
    planned = dict(enumerate(run.plan.shards["row_count"].to_pylist()))
    found = [stage_status(run.scan, planned, tries)]
    for name in STAGES:
        stage = Stage.find(run, name)
        if stage is not None:
            rows = dict(collections.Counter(stage.items["shard"].to_pylist()))
            found.append(stage_status(stage.ledger, rows, tries))
    return {
        "run": url,
        "model": run.config["model"],
        "rows": run.facts["rows"],
        "unique": run.facts["unique"],
        "stages": [_facts(run, status) for status in found],
    }


def _facts(run: Run, status: StageStatus) -> dict[str, Any]:
    ledger = run.scan if status.stage == "scan" else Stage.find(run, status.stage).ledger  # type: ignore[union-attr]
    errors = {str(shard): ledger.attempts(shard)[-1]["error"] for shard in status.quarantined}
    return {**asdict(status), "complete": status.complete, "eta_seconds": status.eta, "errors": errors}


def status_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"{found['run']}: {found['rows']:,} rows, {found['unique']:,} unique captions, model {found['model']}"]
    for stage in found["stages"]:
        counts = ", ".join(f"{value:,} {key}" for key, value in stage["counts"].items() if value)
        line = f"{stage['stage']:<13} {stage['done']}/{stage['shards']} shards, "
        line += f"{stage['rows_done']:,}/{stage['rows']:,} rows"
        if counts:
            line += f" ({counts})"
        if stage["rate"] and not stage["complete"]:
            line += f", {stage['rate']:.1f} rows/s"
        if stage["eta_seconds"]:
            line += f", about {stage['eta_seconds']:.0f} s left"
        lines.append(line)
        took = {key: value for key, value in stage["seconds"].items() if key != "wall"}
        if took and stage["seconds"].get("wall"):
            shares = ", ".join(f"{key} {value:.1f} s" for key, value in took.items())
            lines.append(f"{'':<13} {shares}; {stage['seconds']['wall']:.1f} s in all")
        lines += [f"{'':<13} shard {shard} given up: {error}" for shard, error in stage["errors"].items()]
    return lines
