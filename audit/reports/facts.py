"""What the first screen of a report says: what was audited, how far it is, what was found and what it cost."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.captions import SAMPLE
from audit.index.query import index_info
from audit.reports.flagged import Flagged, picked_by
from audit.run.run import Run
from audit.run.schema import COPIES, VERDICTS
from audit.run.select import unlooked_line
from audit.run.stage import CONFIRM, NULL_MAPS, SECOND_LOOK, SECOND_NULL_MAPS, TRAJECTORIES, Stage
from audit.run.status import RunStatus, run_status
from audit.scores.second_look import SecondLookFingerprint, looks_noises
from audit.statistics.multiple import expected_false
from audit.statistics.null import Null
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import read_null

BINS = 60
SETTINGS = ("steps", "guidance_scale", "seed", "num_noises", "dtype")


def _inputs(run: Run) -> list[dict[str, Any]]:
    """The input files and how many of their rows the run has."""
    rows: Counter[int] = Counter()
    shards = run.plan.shards
    for file, count in zip(shards["file_index"].to_pylist(), shards["row_count"].to_pylist(), strict=True):
        rows[file] += count
    return [{"file": file.path, "rows": rows[number]} for number, file in enumerate(run.plan.files)]


def _noises(run: Run) -> str:
    """Over how many initial noises the scores are."""
    first, look = run.fingerprint.num_noises, Stage.find(run, SECOND_LOOK)
    words = f"{first} initial noise{'s' if first != 1 else ''}"
    if look is None:
        return words
    asked = look.fingerprint(SecondLookFingerprint)
    return f"{words}, the best-scored {asked.fraction:.4g} of the captions {asked.num_noises}"


def report_facts(run: Run, flagged: Flagged) -> dict[str, Any]:
    """All of it as one JSON-able dict: it becomes report.json, and index.html is made from it."""
    status = run_status(run.url)
    fingerprint = run.fingerprint
    verdicts = flagged.table["verdict"]
    counts = {name: int(pc.sum(pc.equal(verdicts, name)).as_py() or 0) for name in VERDICTS}
    confirmed = _confirm_facts(run, flagged)
    return {
        "format": 1,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.url,
        "created": run.facts.created,
        "digest": run.digest,
        "version": run.facts.versions.get("be-audit", ""),
        "versions": run.facts.versions,
        "model": {
            "name": run.facts.model,
            "revision": fingerprint.model.revision,
            "sha256": fingerprint.model.weights_sha256,
        },
        "captions": _inputs(run),
        "settings": {name: getattr(fingerprint, name) for name in SETTINGS} | {"noises": _noises(run)},
        "mask": fingerprint.mask,
        "null_maps": {"captions": len(run.plan.sample), "few": len(run.plan.sample) < SAMPLE},
        "planned": {"rows": run.facts.rows, "unique": run.facts.unique},
        "scanned": flagged.counts,
        "score": flagged.by,
        "threshold": flagged.threshold,
        "above": flagged.above,
        "taken": flagged.taken,
        "listed": flagged.table.num_rows,
        "templates": len(pc.unique(flagged.table["template"])),
        "confirm": confirmed,
        "verdicts": counts,
        "decided": sum(counts.values()) - counts["no_reference"],
        "copied": sum(counts[name] for name in COPIES),
        "unfinished": [
            *_unfinished(status),
            *status.not_begun.values(),
            *([unlooked_line(flagged.unlooked, flagged.by)] if flagged.unlooked else []),
        ],
        "not_checked": _not_checked(flagged, status, confirmed, counts),
        "cost": _cost(run, status),
        "histogram": histogram(flagged),
    }


def _confirm_facts(run: Run, flagged: Flagged) -> dict[str, Any] | None:
    """How the verdicts were reached; None without a confirm.

    `null` says what the threshold rests on, `null_size` on how many; `rate_low` and `rate_high` are the 95 % interval
    of the true false-positive rate a candidate; `expected_false` is how many of the local verdicts are expected to be
    false, at most.
    """
    stage, stored = Stage.find(run, CONFIRM), read_null(run)
    if stage is None:
        return None
    config = stage.config(ConfirmConfig)
    null = Null.given(-np.inf, config.match_fpr) if stored is None else stored.null()
    low, high = null.rate
    q = flagged.table["q_value"].to_numpy()
    local = pc.fill_null(pc.equal(flagged.table["verdict"], "local"), False).to_numpy()
    bound = {name: None if stored is None else getattr(stored, name) for name in ("threshold", "low", "high")}
    return {
        "candidates": stage.items.num_rows,
        "by": picked_by(run),
        "num_images": config.num_images,
        "neighbours": config.neighbours,
        "match_mask": config.match_mask,
        "match_fpr": config.match_fpr,
        **bound,
        "null": null.source,
        "null_size": len(null),
        "null_copies": null.copies,
        "null_missing": len(null.missing),
        "rate_low": low,
        "rate_high": high,
        "expected_false": expected_false(q, local) if len(null) else None,
        "index": config.index,
        "index_facts": _index_facts(config.index),
    }


def _index_facts(path: str) -> dict[str, Any] | None:
    """What was compared with; None where the index is not there any more."""
    try:
        info = index_info(path)
    except (AuditError, OSError):
        return None
    return {
        "fingerprint": info.fingerprint,
        "pictures": info.ok,
        "unreadable": info.errors,
        "descriptor": info.descriptor.name,
        "descriptor_sha256": info.descriptor.sha256,
    }


def _not_checked(
    flagged: Flagged, status: RunStatus, confirmed: dict[str, Any] | None, verdicts: dict[str, int]
) -> list[str]:
    """What the audit did not look at and why, one sentence each."""
    counts = flagged.counts
    lines = []
    for name, why in (
        ("error", "captions could not be scored (column `error` says why)"),
        ("empty", "rows have no caption"),
        ("pending", "rows are not scored yet"),
    ):
        if counts[name]:
            lines.append(f"{counts[name]:,} {why}.")
    if confirmed is None:
        lines.append(f"{counts['distinct']:,} scored captions: no image of them was compared with training pictures.")
        return lines
    if rest := counts["distinct"] - confirmed["candidates"]:
        lines.append(f"{rest:,} scored captions were no candidates: their score is all that is known of them.")
    undecided = confirmed["candidates"] - sum(verdicts.values())
    if undecided:
        lines.append(f"{undecided:,} candidates have no verdict: their images were not generated or not compared.")
    if verdicts["no_reference"]:
        lines.append(f"{verdicts['no_reference']:,} candidates could be compared with no training picture.")
    stages = {stage.stage: stage.counts for stage in status.stages}
    if failed := stages.get(TRAJECTORIES.name, {}).get("error", 0):
        lines.append(f"{failed:,} images could not be generated (column `error` of trajectories/ says why).")
    if unread := stages.get(CONFIRM.name, {}).get("unreadable", 0):
        lines.append(f"{unread:,} comparisons decided nothing: the training pictures could not be read.")
    if confirmed["null_missing"]:
        lines.append(
            f"{confirmed['null_missing']:,} training pictures that the local threshold should rest on "
            "could not be read."
        )
    if confirmed["threshold"] is None:
        lines.append("Copied regions: no local threshold could be had; only copies of whole pictures were told.")
    index = confirmed["index_facts"]
    if index is None:
        lines.append("The index is not at hand any more: its size and descriptor are not stated.")
    elif index["unreadable"]:
        lines.append(f"{index['unreadable']:,} training pictures could not be read and are not in the index.")
    return lines


def _unfinished(status: RunStatus) -> list[str]:
    """One sentence a stage that is not done; [] when everything is."""
    lines = []
    for stage in status.stages:
        if not stage.complete:
            lines.append(
                f"{stage.stage}: {stage.rows_done:,} of {stage.rows:,} rows "
                f"({stage.done:,} of {stage.shards:,} shards) are done"
            )
        lines += [f"{stage.stage}: shard {shard} was given up: {error}" for shard, error in stage.errors.items()]
    return lines


def _cost(run: Run, status: RunStatus) -> dict[str, Any]:
    """Worker time by stage from the commits, and U-Net evaluations of null maps, scan and trajectories.

    A mitigation's are not counted: they depend on the updates every row took.
    """
    seconds = {stage.stage: stage.seconds.get("wall", 0.0) for stage in status.stages}
    done = {stage.stage: stage.counts.get("ok", 0) for stage in status.stages}
    noises, steps = run.fingerprint.num_noises, run.fingerprint.steps
    images = done.get("refine", 0) + done.get("trajectories", 0)
    look = looks_noises(run)
    again = 0 if look is None else done.get(SECOND_LOOK.name, 0) * (look - noises)
    sampled = sum(done.get(kind.name, 0) for kind in (NULL_MAPS, SECOND_NULL_MAPS))
    each = 2 * steps if run.fingerprint.mask == "final" else 1 + run.fingerprint.extra_evaluation
    first = noises * (done["scan"] + (bool(done["scan"]) and run.fingerprint.mask != "final"))  # and one for "" a noise
    evaluations = (first + again) * each + sampled + 2 * steps * images
    return {"seconds": seconds, "total_seconds": sum(seconds.values()), "evaluations": evaluations}


def histogram(flagged: Flagged) -> dict[str, Any]:
    """Scores of all scored captions in BINS equal bins, and those of the reproduced ones in the same."""
    if not len(flagged.scores):
        return {"edges": [], "all": [], "copied": []}
    low, high = float(flagged.scores.min()), float(flagged.scores.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    copied = flagged.table.filter(pc.is_in(flagged.table["verdict"], pa.array(COPIES)))
    return {
        "edges": [float(each) for each in edges],
        "all": np.histogram(flagged.scores, edges)[0].tolist(),
        "copied": np.histogram(copied["score"].to_numpy(), edges)[0].tolist(),
    }
