"""`be-audit confirm`: regenerate the most suspicious captions and prove, or not, what was copied, from where."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.commits import read_table
from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import digest
from audit.base.options import option
from audit.base.stopping import Stop
from audit.index import Index
from audit.index.build import DEFAULT_INDEX
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import DEFAULT_SCORE, MASKS, SCORES, VERDICTS, tensor_values
from audit.run.select import best_rows, with_images
from audit.run.stage import CONFIRM, SCAN, TRAJECTORIES, Stage, run_stage, sum_counts
from audit.scores.calibrate import load_thresholds
from audit.scores.config import DEVICE_HELP, ENGINES
from audit.scores.trajectories import decode_png
from audit.statistics.null import Null, NullFacts
from audit.verdicts.compare import COPY, References, masks_at
from audit.verdicts.null import local_null

DEFAULT_TOP_K = 100
SHARD_IMAGES = 32  # trajectories a shard: what a kill can lose
NULL_FILE = "null.json"  # beside the rows of confirm


@dataclass(frozen=True)
class ConfirmConfig:
    """Which rows to confirm, against what, and how strictly. Every field is a flag of `be-audit confirm`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    index: str = option(DEFAULT_INDEX, "Index of the training pictures.", envvar="BE_AUDIT_INDEX")
    sscd: str | None = option(None, "Copy descriptor file; default the one the index was made with.")
    by: str = option(DEFAULT_SCORE, "Score the candidates are picked by.", choices=SCORES)
    threshold: float | None = option(None, "Candidates: rows scored above this.")
    thresholds: str | None = option(None, "Candidates: rows above the threshold in this file (be-audit calibrate).")
    top_fraction: float | None = option(None, "Candidates: this fraction of the captions.", min=0.0, max=1.0)
    top_k: int | None = option(None, f"Candidates: this many; {DEFAULT_TOP_K} when nothing else is said.", min=1)
    num_images: int = option(1, "Images generated of every candidate.", min=1, max=4096)
    neighbours: int = option(10, "Nearest training pictures every image is compared with.", min=1)
    match_mask: str = option("energy", "Mask of the local verdict.", choices=tuple(MASKS))
    match_fpr: float = option(0.01, "False-positive rate of the local verdict.", min=1e-6, max=0.5)
    ls_threshold: float | None = option(None, "Local threshold of the masked distance, instead of calibrating it.")
    null_pictures: int = option(1000, "Training pictures the local threshold is calibrated on.", min=20)
    device: str = option("auto", DEVICE_HELP)
    batch_size: int = option(32, "Latents in one U-Net call; halved when memory runs out.", min=1)
    engine: str = option("local", "Where trajectories run.", choices=ENGINES)
    workers: int = option(0, "Worker processes; 0 is one a GPU.", min=0, max=1024)
    max_error_rate: float = option(
        0.05, "A shard with a larger share of failed images is not committed.", min=0.0, max=1.0
    )
    max_shard_retries: int = option(3, "Tries of a shard before it is given up.", min=1)
    batch_timeout: float = option(
        3600.0,
        "Seconds without a finished batch after which a worker process is killed and replaced; 0 never.",
        min=0.0,
    )
    replace: bool = option(False, "Discard an earlier confirm that was begun differently.")


@dataclass(frozen=True)
class TrajectoriesFingerprint:
    """What the generated images depend on beside the run: which rows, by which score, and how many images of each."""

    by: str
    candidates: int
    rows: str
    num_images: int


@dataclass(frozen=True)
class ConfirmFingerprint:
    """What a verdict depends on: the images, the index and its descriptor, and the flags of the comparison."""

    trajectories: str
    index: str
    descriptor: str
    neighbours: int
    match_mask: str
    match_fpr: float
    ls_threshold: float | None
    null_pictures: int


@dataclass(frozen=True)
class ConfirmSummary:
    """What a confirm did.

    Attributes:
        candidates: rows confirmed. verdicts: how many of each. null: the local threshold and what it rests on.
        failed: trajectories that failed. quarantined: shards given up. unreadable: comparisons with training pictures
            that could not be read any more.
        committed_now: shards done by this call.
    """

    run: str
    candidates: int
    verdicts: dict[str, int]
    null: Null
    failed: int
    quarantined: list[int]
    unreadable: int
    committed_now: int
    seconds: float

    @property
    def decided(self) -> int:
        """Candidates with a verdict."""
        return sum(self.verdicts.values())

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed trajectories or shards, or with candidates that have no verdict."""
        return 3 if self.failed or self.quarantined or self.decided < self.candidates else 0

    def lines(self) -> list[str]:
        """For people."""
        shown = [name for name in VERDICTS if self.verdicts[name] or name != "no_reference"]
        counts = ", ".join(f"{self.verdicts[name]} {name}" for name in shown)
        lines = [f"{self.run}: {self.candidates} candidates: {counts} ({self.seconds:.1f} s)."]
        null = self.null
        if null.pictures:
            low, high = null.low, null.high
            between = f"at most {high:.4g}" if np.isinf(low) else f"[{low:.4g}, {high:.4g}]"
            local = f"masked distance < {null.threshold:.4g}" if np.isfinite(null.threshold) else "none"
            lines.append(
                f"global: sscd > {COPY:g}. local: {local} (95 % {between}; "
                f"false-positive rate {null.fpr:g} a candidate, from {null.pictures} training pictures)."
            )
            if np.isinf(low) or np.isinf(null.threshold):
                lines.append(f"{null.pictures} pictures are few for that rate: index more, or raise --match-fpr.")
        elif np.isinf(null.threshold):
            what = "no image was generated" if self.failed else "the index holds no pixels"
            lines.append(f"No local threshold: {what}; only global copies can be told.")
        if self.unreadable:
            lines.append(f"{self.unreadable} training pictures could not be read any more: compared by sscd alone.")
        if self.failed:
            lines.append(f"{self.failed} trajectories failed: be-audit status {self.run}")
        if self.decided < self.candidates:
            left = self.candidates - self.decided
            lines.append(
                f"{left} candidates have no verdict yet: give the command again; why: be-audit status {self.run}"
            )
        return lines


def confirm(config: ConfirmConfig, stop: Stop | None = None) -> ConfirmSummary:
    """Confirm a run's candidates, or go on with a confirm that was begun.

    Raises:
        AuditError: no run, no index, another descriptor, or a confirm begun differently.
        Drained: `stop` asked to.
        Broken: every worker failed shard after shard; no verdict was begun that needs what is missing.
    """
    started = time.monotonic()
    run = Run.open(config.run)
    index = Index.open(config.index)
    descriptor = index.load_descriptor(config.sscd, config.device)
    # 1. candidates, and images of them
    trajectories = _begin_trajectories(run, config)
    generated = run_stage(trajectories, trajectories.missing(), config, stop)
    # 2. the local threshold: one for all verdicts of this confirm, however often it is gone on with
    fingerprint = ConfirmFingerprint(
        trajectories=trajectories.facts.digest,
        index=index.fingerprint,
        descriptor=descriptor.sha256,
        neighbours=config.neighbours,
        match_mask=config.match_mask,
        match_fpr=config.match_fpr,
        ls_threshold=config.ls_threshold,
        null_pictures=config.null_pictures,
    )
    first = pc.equal(trajectories.items["image_index"], 0)
    items = trajectories.items.filter(first).drop_columns(["image_index"])
    stage, null = _begin_verdicts(run, trajectories, index, fingerprint, items, config)
    # 3. verdicts of what was generated
    ready = trajectories.done()
    outcome = run_stage(stage, [shard for shard in stage.missing() if shard in ready], config, stop)
    counts = sum_counts(stage.done().values())
    return ConfirmSummary(
        run=config.run,
        candidates=stage.items.num_rows,
        verdicts={name: counts.get(name, 0) for name in VERDICTS},
        null=null,
        failed=sum_counts(ready.values()).get("error", 0),
        quarantined=generated.quarantined + outcome.quarantined,
        unreadable=counts.get("unreadable", 0),
        committed_now=len(generated.committed) + len(outcome.committed),
        seconds=time.monotonic() - started,
    )


def resume(run: Run, stop: Stop | None = None) -> None:
    """Go on with a run's confirm as it was begun (`verify --repair`)."""
    stage = Stage.find(run, CONFIRM) or Stage.open(run, TRAJECTORIES)
    confirm(replace(stage.config(ConfirmConfig), run=run.url, replace=False), stop)


def read_null(run: Run) -> NullFacts | None:
    """The local threshold a run's verdicts rest on; None before there are any. Raises Damaged: not what was written."""
    stage = Stage.find(run, CONFIRM)
    return None if stage is None else _null_of(stage)


def _null_of(stage: Stage) -> NullFacts:
    return read_facts(NullFacts, stage.sealed(NULL_FILE), stage.run.folder.path(stage.place(NULL_FILE)))


def check_same(run: Run) -> None:
    """Raise AuditError where the index of a run's confirm is not the one it was begun with."""
    stage = Stage.find(run, CONFIRM)
    if stage is None:
        return
    config, begun = stage.config(ConfirmConfig), stage.fingerprint(ConfirmFingerprint)
    index = Index.open(config.index)
    if index.fingerprint != begun.index:
        raise AuditError(f"--index {config.index}: not the index confirm used; nothing was touched")
    if index.load_descriptor(config.sscd, config.device).sha256 != begun.descriptor:
        raise AuditError("--sscd: not the descriptor confirm used; nothing was touched")


def _recorded(config: ConfirmConfig) -> ConfirmConfig:
    """As the stage keeps it: a local index by its absolute path, to be found from elsewhere."""
    return replace(config, index=config.index if "://" in config.index else os.path.abspath(config.index))


def _begin_trajectories(run: Run, config: ConfirmConfig) -> Stage:
    """Pick the candidates and begin their trajectories; the scan must be complete, or the best would be missing."""
    scan = Stage.open(run, SCAN)
    left = scan.missing()
    if left:
        raise AuditError(
            f"{run.url}: {len(left)} of {len(scan.shards)} shards are not scanned yet: go on with `be-audit scan`"
        )
    threshold, by = config.threshold, config.by
    if config.thresholds is not None:
        if threshold is not None:
            raise AuditError("--threshold and --thresholds: give one of them")
        threshold = load_thresholds(config.thresholds, run).threshold(by)
    top_k = config.top_k
    if top_k is None and threshold is None and config.top_fraction is None:
        top_k = DEFAULT_TOP_K
    chosen = best_rows(run, by, top_k, config.top_fraction, threshold)
    if not chosen.num_rows:
        raise AuditError(f"{run.url}: no caption scores above {threshold:g} by {by}: nothing to confirm")
    rows = digest({"row_ids": chosen["row_id"].to_pylist()})
    fingerprint = TrajectoriesFingerprint(by, chosen.num_rows, rows, config.num_images)
    per_shard = max(1, SHARD_IMAGES // config.num_images)
    shards = pa.array(np.arange(chosen.num_rows) // per_shard, pa.int32())
    items = with_images(chosen.append_column("shard", shards), config.num_images)
    return Stage.begin(run, TRAJECTORIES, fingerprint, items, _recorded(config), config.replace)


def _begin_verdicts(
    run: Run,
    trajectories: Stage,
    index: Index,
    fingerprint: ConfirmFingerprint,
    items: pa.Table,
    config: ConfirmConfig,
) -> tuple[Stage, Null]:
    """Begin the stage of verdicts, or find it, with the threshold it was begun with."""
    begun = Stage.find(run, CONFIRM)
    if begun is not None and not begun.differs(fingerprint) and not begun.problems():
        return begun, _null_of(begun).null()
    null = _find_null(run, trajectories, index, config)
    beside = {NULL_FILE: to_json(NullFacts.of(null))}
    stage = Stage.begin(run, CONFIRM, fingerprint, items, _recorded(config), config.replace, beside)
    return stage, _null_of(stage).null()


def _find_null(run: Run, trajectories: Stage, index: Index, config: ConfirmConfig) -> Null:
    """The local threshold: given, or calibrated on the index under this run's own match masks."""
    if config.ls_threshold is not None:
        return Null.given(config.ls_threshold, config.match_fpr)
    masks, size = _run_masks(trajectories, MASKS[config.match_mask])
    if not len(index) or not len(masks):
        return Null.given(-np.inf, config.match_fpr)
    references = References(index, size)
    if references.pixels(int(index.ids()[0])) is None:  # made from embeddings: nothing local can be decided
        return Null.given(-np.inf, config.match_fpr)
    return local_null(
        index,
        references,
        masks_at(masks, size),
        config.neighbours,
        config.match_fpr,
        config.num_images,
        config.null_pictures,
        run.fingerprint.seed,
    )


def _run_masks(trajectories: Stage, column: str, at_most: int = 256) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Match masks of the run's own trajectories, [N, h, w], and the size of its images.

    They are spread over all candidates: the best-scored ones have more concentrated masks than the others, under which
    distances are larger, and a threshold from them alone would be too lenient with the rest.
    """
    masks: list[NDArray[np.float32]] = []
    size = (0, 0)
    shards = sorted(trajectories.done())
    chosen = [shards[at] for at in _spread(len(shards), 64)]
    each = -(-at_most // max(len(chosen), 1))
    for shard in chosen:
        table = read_table(trajectories.run.folder, trajectories.file(shard), [column, "image", "error"])
        table = table.filter(pc.is_null(table["error"]))
        if table.num_rows:
            masks.append(tensor_values(table[column])[_spread(table.num_rows, each)])
            height, width, _ = decode_png(table["image"][0].as_py()).shape
            size = height, width
    return (np.concatenate(masks) if masks else np.zeros((0, 1, 1), np.float32)), size


def _spread(count: int, at_most: int) -> NDArray[np.int64]:
    """At most so many places among `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))
