"""`be-audit mitigate`: move the embeddings of prompts that copy, generate again, and measure whether it worked."""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.base.fingerprint import digest, file_sha256
from audit.base.options import option
from audit.base.stopping import Stop
from audit.engines.config import EngineFlags
from audit.engines.keep import keeping
from audit.index import Index
from audit.mitigation.config import MovingConfig, find_clip, trigger_column
from audit.mitigation.target import clean_target
from audit.run.read import dataset, read_stage, take_rows
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import COPIES, MITIGATED_COLUMNS, VERDICTS
from audit.run.select import with_images
from audit.run.stage import CONFIRM, MITIGATE, TRAJECTORIES, Stage, run_stage
from audit.scores.calibrate import load_thresholds
from audit.verdicts.candidates import ConfirmConfig, TrajectoriesFingerprint
from audit.verdicts.confirm import ConfirmFingerprint, read_null

MEASURES = ("ld", "magnitude", "sscd", "alignment")  # whose means the summary has


@dataclass(frozen=True)
class CopiesFlags(MovingConfig):
    """Which copies of a run to mitigate, and how."""

    run: str = option(DEFAULT_RUN, "Run folder with a confirm.", argument=True, envvar="BE_AUDIT_RUN")
    thresholds: str | None = option(None, "Trigger: the threshold in this file (be-audit calibrate).")
    top_k: int | None = option(None, "Mitigate this many captions, global copies first; default all copies.", min=1)
    replace: bool = option(False, "Discard an earlier mitigation that was begun differently.")


@dataclass(frozen=True)
class MitigateConfig(EngineFlags, CopiesFlags):
    """Which copies of a run to mitigate, how, and where it runs. Every field is a flag of `be-audit mitigate`."""


@dataclass(frozen=True)
class MitigateFingerprint:
    """What a mitigation depends on: the verdicts, which rows, and how embeddings are moved and measured."""

    confirm: str
    captions: int
    rows: str
    num_images: int
    target: float
    threshold: float | None
    clip: str | None
    loss: str
    mask: str | None
    learning_rate: float
    iterations: int


@dataclass(frozen=True)
class MitigateSummary:
    """What a mitigation did; counts and means are over images.

    Attributes:
        captions, images: mitigated or left as they are. untriggered: left, below the trigger. reached: loss_after at
            most the target. target: of the loss.
        verdicts: name -> (before, after), against the same training pictures.
        means: of ld, magnitude, sscd, alignment (before, after), over the triggered images; alignment only with a CLIP.
        failed: rows with an error. quarantined: shards given up. unconfirmed: shards confirm has not done.
        missing: images to mitigate that are not there.
        committed_now: shards done by this call.
    """

    run: str
    captions: int
    images: int
    untriggered: int
    reached: int
    loss: str
    target: float
    verdicts: dict[str, tuple[int, int]]
    means: dict[str, tuple[float, float]]
    failed: int
    quarantined: list[int]
    unconfirmed: int
    missing: int
    committed_now: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed rows or shards, or with images that are not there."""
        return 3 if self.failed or self.quarantined or self.unconfirmed or self.missing else 0

    def lines(self) -> list[str]:
        """For people."""
        moved = self.images - self.untriggered - self.failed
        lines = [
            f"{self.run}: {self.captions} captions, {self.images} images: {moved} mitigated, {self.untriggered} below "
            f"the trigger; {self.reached} reached {self.loss} <= {self.target:.4g} ({self.seconds:.1f} s)."
        ]
        verdicts = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.verdicts.items())
        lines.append(f"Against the same training pictures: {verdicts}.")
        if self.means:
            means = ", ".join(f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in self.means.items())
            lines.append(f"Means of the mitigated: {means}.")
        if moved and "alignment" not in self.means:
            lines.append("Text alignment was not measured: give a CLIPModel folder with --clip.")
        if self.failed:
            lines.append(f"{self.failed} images failed: see the column error of mitigated/")
        if self.missing:
            lines.append(f"{self.missing} images are missing: give the command again; why: be-audit status {self.run}")
        if self.unconfirmed:
            lines.append(f"{self.unconfirmed} shards are not confirmed and were left out: be-audit status {self.run}")
        return lines


@keeping()
def mitigate(config: MitigateConfig, stop: Stop | None = None) -> MitigateSummary:
    """Mitigate a run's confirmed copies, or go on with a mitigation that was begun.

    Raises:
        AuditError: no run, nothing confirmed, another index than confirm's, or a mitigation begun differently.
        Drained: `stop` asked to.
    """
    started = time.monotonic()
    run = Run.open(config.run)
    stage, unconfirmed = _begin(run, config)
    outcome = run_stage(stage, stage.missing(), config, stop)
    begun = stage.fingerprint(MitigateFingerprint)
    counted = _count(read_stage(run, "mitigate", [name for name in MITIGATED_COLUMNS if not name.startswith("image_")]))
    return MitigateSummary(
        run=config.run,
        loss=begun.loss,
        target=begun.target,
        quarantined=outcome.quarantined,
        unconfirmed=unconfirmed,
        missing=stage.items.num_rows - counted["images"],
        committed_now=len(outcome.committed),
        seconds=time.monotonic() - started,
        **counted,
    )


def resume(run: Run, stop: Stop | None = None) -> None:
    """Go on with a run's mitigation as it was begun (`verify --repair`)."""
    config = Stage.open(run, MITIGATE).config(MitigateConfig)
    mitigate(replace(config, run=run.url, replace=False), stop)


def check_same(run: Run) -> None:
    """Raise AuditError where the index or the CLIP of a run's mitigation is not the one it was begun with."""
    stage = Stage.open(run, MITIGATE)
    config, begun = stage.config(MitigateConfig), stage.fingerprint(MitigateFingerprint)
    confirmed = Stage.open(run, CONFIRM)
    Index.open_same(config.index or "", confirmed.fingerprint(ConfirmFingerprint).index)
    if begun.clip is not None and (config.clip is None or _folder_digest(config.clip) != begun.clip):
        raise AuditError(f"--clip {config.clip}: not the CLIP model the mitigation was begun with; nothing was touched")


def _begin(run: Run, config: MitigateConfig) -> tuple[Stage, int]:
    """Pick the copies and begin the stage; shards are confirm's. Also how many of those confirm has not done."""
    confirmed, trajectories = Stage.find(run, CONFIRM), Stage.find(run, TRAJECTORIES)
    found = dataset(run, CONFIRM)
    if confirmed is None or trajectories is None or found is None:
        raise AuditError(f"{run.url}: nothing is confirmed yet: give `be-audit confirm {run.url}` first")
    null = read_null(run)
    if null is not None and (why := null.null().untold):
        raise AuditError(
            f"{run.url}: its confirm has no local threshold yet, since training pictures cannot be read: {why}: give "
            f"`be-audit confirm {run.url}` again when they are back"
        )
    # 1. which rows
    table = take_rows(run, found, ["row_id", "caption", "verdict", "candidate_rank"])
    table = table.filter(pc.is_in(table["verdict"], pa.array(COPIES)))
    if not table.num_rows:
        raise AuditError(f"{run.url}: confirm found no copies: nothing to mitigate")
    table = table.sort_by([("verdict", "ascending"), ("candidate_rank", "ascending")])  # global before local
    table = table.slice(0, config.top_k)
    shard_of = dict(zip(*(confirmed.items[name].to_pylist() for name in ("row_id", "shard")), strict=True))
    shards = pa.array([shard_of[row_id] for row_id in table["row_id"].to_pylist()], pa.int32())
    chosen = table.select(["row_id", "caption"]).append_column("shard", shards)
    made = trajectories.fingerprint(TrajectoriesFingerprint).num_images
    num_images = config.num_images or made
    if num_images > made:
        raise AuditError(f"--num-images {num_images}: confirm made {made} a caption; give at most that")
    # 2. measured with what
    used = confirmed.fingerprint(ConfirmFingerprint).index
    index = Index.open_same(config.index or confirmed.config(ConfirmConfig).index, used)
    index.load_descriptor(config.sscd, config.device)
    clip = find_clip(config.clip, run.facts.model)
    # 3. trigger and target
    readable = run.fingerprint.mask != "none"
    mask = config.mask or ("final" if readable else "energy")
    if config.loss == "ld" and mask != "energy" and not readable:
        raise AuditError(f"--mask {mask}: the run's model has no attention masks: give --mask energy")
    threshold, by = config.threshold, trigger_column(config.loss, mask)
    if config.thresholds is not None:
        if threshold is not None:
            raise AuditError("--threshold and --thresholds: give one of them")
        threshold = load_thresholds(config.thresholds, run, 1).threshold(by)  # an image has one noise
    target = config.target
    if target is None:
        target = begun_target(run, confirmed, config, mask)
    if target is None:
        target = clean_target(run, trajectories, config, mask, config.compile)
    fingerprint = MitigateFingerprint(
        confirm=confirmed.facts.digest,
        captions=chosen.num_rows,
        rows=digest({"row_ids": chosen["row_id"].to_pylist()}),
        num_images=num_images,
        target=target,
        threshold=threshold,
        clip=None if clip is None else _folder_digest(clip),
        loss=config.loss,
        mask=None if config.loss == "magnitude" else mask,
        learning_rate=config.learning_rate,
        iterations=config.iterations,
    )
    recorded = replace(config, threshold=threshold, thresholds=None, mask=mask)
    recorded = replace(recorded, clip=clip, index=index.folder.url)
    items = with_images(chosen, num_images)
    stage = Stage.begin(run, MITIGATE, fingerprint, items, recorded, config.replace)
    return stage, len(confirmed.missing())


def begun_target(run: Run, confirmed: Stage, config: MitigateConfig, mask: str) -> float | None:
    """The target of the same mitigation begun earlier: measured once, whatever machine goes on with it. None where it
    was given.
    """
    stage = Stage.find(run, MITIGATE)
    if stage is None or stage.config(MitigateConfig).target is not None:
        return None
    begun = stage.fingerprint(MitigateFingerprint)
    of_loss = None if config.loss == "magnitude" else mask
    same = (begun.confirm, begun.loss, begun.mask) == (confirmed.facts.digest, config.loss, of_loss)
    return begun.target if same else None


def _folder_digest(folder: str) -> str:
    """Hash over the files of a folder."""
    return digest({path.name: file_sha256(path) for path in sorted(Path(folder).iterdir()) if path.is_file()})


def _count(table: pa.Table | None) -> dict[str, Any]:
    """The summary's counts and means from the committed rows."""
    rows = [] if table is None else table.to_pylist()
    good = [row for row in rows if row["error"] is None]
    moved = [row for row in good if row["triggered"]]
    means = {}
    for name in MEASURES:
        pairs = [(row[f"{name}_before"], row[f"{name}_after"]) for row in moved]
        if pairs and None not in pairs[0]:
            means[name] = tuple(np.mean(pairs, 0).tolist())
    counts = {when: collections.Counter(row[f"verdict_{when}"] for row in good) for when in ("before", "after")}
    return {
        "captions": len({row["row_id"] for row in rows}),
        "images": len(rows),
        "untriggered": len(good) - len(moved),
        "reached": sum(row["loss_after"] <= row["target"] for row in moved),
        "verdicts": {name: (counts["before"][name], counts["after"][name]) for name in VERDICTS[:3]},
        "means": means,
        "failed": len(rows) - len(good),
    }
