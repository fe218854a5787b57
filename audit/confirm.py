"""`be-audit confirm`: regenerate the most suspicious captions and prove, or not, what was copied, from where."""

from __future__ import annotations

import collections
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.commits import read_table
from audit.confirm_job import ConfirmJob
from audit.engines.local import run_here
from audit.errors import AuditError
from audit.fingerprint import digest
from audit.index import Index
from audit.matching import (
    COPY,
    MATCH_MASKS,
    VERDICTS,
    Null,
    References,
    local_null,
    masks_at,
)
from audit.options import config_of, option
from audit.progress import Progress
from audit.refine import best_rows, with_images
from audit.run import DEFAULT_RUN, Run, Stage
from audit.schema import (
    DEFAULT_SCORE,
    DETECTORS,
    WINDOWS,
    tensor_values,
)
from audit.stopping import Stop
from audit.trajectories import decode_png

DEFAULT_INDEX = "be-audit-index"
DEFAULT_TOP_K = 100
SHARD_IMAGES = 32  # trajectories a shard: what a kill can lose


@dataclass(frozen=True)
class ConfirmConfig:
    """Which rows to confirm, against what, and how strictly. Every field is a flag of `be-audit confirm`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    index: str = option(DEFAULT_INDEX, "Index of the training pictures.", envvar="BE_AUDIT_INDEX")
    sscd: str | None = option(None, "Copy descriptor file; default the one the index was made with.")
    by: str = option(DEFAULT_SCORE, "Score the candidates are picked by.", choices=(*DETECTORS, *WINDOWS))
    threshold: float | None = option(None, "Candidates: rows scored above this.")
    thresholds: str | None = option(None, "Candidates: rows above the threshold in this file (be-audit calibrate).")
    top_fraction: float | None = option(None, "Candidates: this fraction of the captions.", min=0.0, max=1.0)
    top_k: int | None = option(None, f"Candidates: this many; {DEFAULT_TOP_K} when nothing else is said.", min=1)
    num_images: int = option(1, "Images generated of every candidate.", min=1)
    neighbours: int = option(10, "Nearest training pictures every image is compared with.", min=1)
    match_mask: str = option("energy", "Mask of the local verdict.", choices=tuple(MATCH_MASKS))
    match_fpr: float = option(0.01, "False-positive rate of the local verdict.", min=1e-6, max=0.5)
    ls_threshold: float | None = option(None, "Local threshold of the masked distance, instead of calibrating it.")
    null_pictures: int = option(1000, "Training pictures the local threshold is calibrated on.", min=20)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    batch_size: int = option(32, "Latents in one U-Net call; halved when memory runs out.", min=1)
    engine: str = option("local", "Where trajectories run.", choices=("local", "ray"))
    workers: int = option(0, "Worker processes; 0 is one a GPU.", min=0)
    max_error_rate: float = option(
        0.05, "A shard with a larger share of failed images is not committed.", min=0.0, max=1.0
    )
    max_shard_retries: int = option(3, "Tries of a shard before it is given up.", min=1)
    replace: bool = option(False, "Discard an earlier confirm that was begun differently.")


@dataclass(frozen=True)
class ConfirmSummary:
    """What a confirm did.

    Attributes:
        candidates: rows confirmed. verdicts: how many of each. null: the local threshold and what it rests on.
        failed: trajectories that failed. quarantined: shards given up. unreadable: training pictures that were gone.
        committed_now: shards done by this call.
    """

    run: str
    candidates: int
    verdicts: dict[str, int]
    null: dict[str, Any]
    failed: int
    quarantined: list[int]
    unreadable: int
    committed_now: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed trajectories or shards."""
        return 3 if self.failed or self.quarantined else 0


def confirm(config: ConfirmConfig, stop: Stop | None = None) -> ConfirmSummary:
    """Confirm a run's candidates, or go on with a confirm that was begun.

    Raises:
        AuditError: no run, no index, another descriptor, or a confirm begun differently.
        Drained: `stop` asked to.
        Broken: every worker failed shard after shard; no verdict was begun that needs what is missing.
    """
    started = time.monotonic()
    stop = stop or Stop()
    run = Run.open(config.run)
    index = open_index(config.index)
    descriptor = index.load_descriptor(config.sscd, config.device)
    trajectories = _begin_trajectories(run, config)
    generated = _generate(run, trajectories, config, stop)
    fingerprint = _fingerprint(trajectories, index, descriptor.facts(), config)
    stored = _stored_null(run, digest({**fingerprint, "run": run.digest}))
    null = stored or _find_null(run, trajectories, index, config)
    first = pc.equal(trajectories.items["image_index"], 0)
    items = trajectories.items.filter(first).drop_columns(["image_index"])
    stage = Stage.begin(run, "confirm", "confirmed", fingerprint, items, config.replace, _recorded(config))
    if stored is None:
        run.folder.write("stages/null.json", json.dumps({**null.facts(), "confirm": stage.facts["digest"]}).encode())
    job = ConfirmJob(run, trajectories, stage, index, descriptor, config, null)
    shards = stage.shards
    done = stage.ledger.done(shards)
    rows = collections.Counter(stage.items["shard"].to_pylist())
    ready = trajectories.ledger.done(trajectories.shards)
    todo = [shard for shard in shards if shard not in done and shard in ready]
    before = sum(rows[shard] for shard in done)
    with Progress(stage.items.num_rows, "candidates", "confirm", before) as progress:
        outcome = run_here(job, todo, config.max_shard_retries, progress, stop)
    committed = stage.ledger.done(shards)
    verdicts = {name: sum(made.counts.get(name, 0) for made in committed.values()) for name in VERDICTS}
    return ConfirmSummary(
        run=config.run,
        candidates=stage.items.num_rows,
        verdicts=verdicts,
        null=null.facts(),
        failed=sum(made.counts.get("error", 0) for made in ready.values()),
        quarantined=generated.quarantined + outcome.quarantined,
        unreadable=len(job.references.unreadable),
        committed_now=len(generated.committed) + len(outcome.committed),
        seconds=time.monotonic() - started,
    )


def open_index(path: str) -> Index:
    """The index, or one line with the command that makes it."""
    try:
        return Index.open(path)
    except AuditError as error:
        if "finished" in str(error):
            raise
        raise AuditError(
            f"{path}: no index of training pictures here: make one with `be-audit index build IMAGES... -o {path}`, "
            "or name one with --index"
        ) from error


def resume_confirm(run: Run, stop: Stop | None) -> ConfirmSummary | None:
    """Go on with a run's confirm as it was begun (verify --repair). None when there was none."""
    stage = Stage.find(run, "confirm") or Stage.find(run, "trajectories")
    if stage is None:
        return None
    return confirm(replace(config_of(ConfirmConfig, stage.facts["config"]), run=run.url, replace=False), stop)


def _recorded(config: ConfirmConfig) -> dict[str, Any]:
    """As the stage keeps it: a local index by its absolute path, to be found from elsewhere."""
    index = config.index if "://" in config.index else os.path.abspath(config.index)
    return {**asdict(config), "index": index}


def _begin_trajectories(run: Run, config: ConfirmConfig) -> Stage:
    """Pick the candidates and begin their trajectories; the scan must be complete, or the best would be missing."""
    left = len(run.plan) - len(run.scan.done())
    if left:
        raise AuditError(f"{run.url}: {left} of {len(run.plan)} shards are not scanned yet: go on with `be-audit scan`")
    threshold, by = config.threshold, config.by
    if config.thresholds is not None:
        if threshold is not None:
            raise AuditError("--threshold and --thresholds: give one of them")
        from audit.calibrate import load_thresholds

        threshold = load_thresholds(config.thresholds, run).threshold(by)
    top_k = config.top_k
    if top_k is None and threshold is None and config.top_fraction is None:
        top_k = DEFAULT_TOP_K
    chosen = best_rows(run, by, top_k, config.top_fraction, threshold)
    if not chosen.num_rows:
        raise AuditError(f"{run.url}: no caption scores above {threshold:g} by {by}: nothing to confirm")
    fingerprint = {
        "by": by,
        "candidates": chosen.num_rows,
        "rows": digest({"row_ids": chosen["row_id"].to_pylist()}),
        "num_images": config.num_images,
    }
    per_shard = max(1, SHARD_IMAGES // config.num_images)
    shards = pa.array(np.arange(chosen.num_rows) // per_shard, pa.int32())
    items = with_images(chosen.append_column("shard", shards), config.num_images)
    return Stage.begin(run, "trajectories", "trajectories", fingerprint, items, config.replace, _recorded(config))


def _generate(run: Run, stage: Stage, config: ConfirmConfig, stop: Stop) -> Any:
    from audit.jobs import run_stage

    run.folder.sweep()
    rows = collections.Counter(stage.items["shard"].to_pylist())
    done = stage.ledger.done(stage.shards)
    todo = [shard for shard in stage.shards if shard not in done]
    return run_stage(run, "trajectories", stage.ledger, todo, config, stop, rows, "images", done)


def _fingerprint(
    trajectories: Stage, index: Index, descriptor: dict[str, Any], config: ConfirmConfig
) -> dict[str, Any]:
    """What a verdict depends on."""
    names = ("neighbours", "match_mask", "match_fpr", "ls_threshold", "null_pictures")
    return {
        "trajectories": trajectories.facts["digest"],
        "index": index.fingerprint,
        "descriptor": descriptor["sha256"],
        **{name: getattr(config, name) for name in names},
    }


def _stored_null(run: Run, stage_digest: str) -> Null | None:
    """The threshold this very confirm was begun with: all its verdicts rest on one, resumed or not."""
    try:
        facts = json.loads(run.folder.read("stages/null.json"))
        return Null.from_facts(facts) if facts["confirm"] == stage_digest else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _find_null(run: Run, trajectories: Stage, index: Index, config: ConfirmConfig) -> Null:
    """The local threshold: given, or calibrated on the index under this run's own match masks."""
    if config.ls_threshold is not None:
        at = config.ls_threshold
        return Null(np.zeros(0), at, at, at, config.match_fpr, config.match_fpr, 0, 0)
    masks, size = _run_masks(trajectories, MATCH_MASKS[config.match_mask])
    if not len(index) or not len(masks):
        return Null(np.zeros(0), -np.inf, -np.inf, -np.inf, config.match_fpr, config.match_fpr, 0, 0)
    references = References(index, size)
    if references.pixels(int(index.ids()[0])) is None:  # made from embeddings: nothing local can be decided
        return Null(np.zeros(0), -np.inf, -np.inf, -np.inf, config.match_fpr, config.match_fpr, 0, 0)
    return local_null(
        index,
        references,
        masks_at(masks, size),
        config.neighbours,
        config.match_fpr,
        config.num_images,
        config.null_pictures,
        int(run.fingerprint["seed"]),
    )


def _run_masks(trajectories: Stage, column: str, at_most: int = 256) -> tuple[Any, tuple[int, int]]:
    """Match masks of the run's own trajectories, [N, h, w], and the size of its images.

    They are spread over all candidates: the best-scored ones have more concentrated masks than the others, under which
    distances are larger, and a threshold from them alone would be too lenient with the rest.
    """
    masks: list[Any] = []
    size = (0, 0)
    shards = sorted(trajectories.ledger.done(trajectories.shards))
    chosen = [shards[at] for at in _spread(len(shards), 64)]
    each = -(-at_most // max(len(chosen), 1))
    for shard in chosen:
        table = read_table(trajectories.run.folder, trajectories.file(shard), [column, "image", "error"])
        table = table.filter(pc.is_null(table["error"]))
        if table.num_rows:
            masks.append(tensor_values(table[column])[_spread(table.num_rows, each)])
            size = decode_png(table["image"][0].as_py()).shape[:2]
    return (np.concatenate(masks) if masks else np.zeros((0, 1, 1), np.float32)), size


def _spread(count: int, at_most: int) -> NDArray[np.int64]:
    """At most so many places among `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def summary_lines(done: ConfirmSummary) -> list[str]:
    """The summary for people."""
    shown = [name for name in VERDICTS if done.verdicts[name] or name != "no_reference"]
    counts = ", ".join(f"{done.verdicts[name]} {name}" for name in shown)
    lines = [f"{done.run}: {done.candidates} candidates: {counts} ({done.seconds:.1f} s)."]
    null = done.null
    if null["pictures"]:
        low, high = null["low"], null["high"]
        between = f"at most {high:.4g}" if low is None else f"[{low:.4g}, {'inf' if high is None else f'{high:.4g}'}]"
        local = "masked distance < {:.4g}".format(null["threshold"]) if null["threshold"] is not None else "none"
        lines.append(
            f"global: sscd > {COPY:g}. local: {local} (95 % {between}; "
            f"false-positive rate {null['match_fpr']:g} a candidate, from {null['pictures']} training pictures)."
        )
        if low is None or null["threshold"] is None:
            lines.append(f"{null['pictures']} pictures are few for that rate: index more, or raise --match-fpr.")
    elif null["threshold"] is None:
        what = "no image was generated" if done.failed else "the index holds no pixels"
        lines.append(f"No local threshold: {what}; only global copies can be told.")
    if done.unreadable:
        lines.append(f"{done.unreadable} training pictures could not be read any more and were compared by sscd alone.")
    if done.failed:
        lines.append(f"{done.failed} trajectories failed: be-audit status {done.run}")
    return lines
