"""`be-audit mitigate`: move the embeddings of prompts that copy, generate again, and measure whether it worked."""

from __future__ import annotations

import collections
import hashlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.confirm import open_index
from audit.errors import AuditError
from audit.fingerprint import digest
from audit.matching import MATCH_MASKS, VERDICTS
from audit.options import config_of, option
from audit.refine import with_images
from audit.run import DEFAULT_RUN, Run, Stage
from audit.scan import DEFAULT_MODEL
from audit.schema import F32
from audit.stopping import Stop
from audit.tables import dataset, read_scores, read_stage

if TYPE_CHECKING:
    from pipelines.alignment import ClipScore

COPIES = ("global", "local")
MEASURES = ("ld", "magnitude", "sscd", "alignment")  # whose means the summary has

MITIGATED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "image_index": (pa.int32(), "which noise of the bank the image starts from, before and after"),
    "caption": (pa.string(), "the caption"),
    "error": (pa.string(), "why the row failed; everything measured is null then"),
    "triggered": (pa.bool_(), "scored above the trigger threshold; other rows are left as they are"),
    "loss": (pa.string(), "ld or magnitude"),
    "target": (F32, "the optimisation stops when the loss is at most this"),
    "iterations": (pa.int32(), "updates of the embedding"),
    "loss_before": (F32, "the loss at the first step of the unmitigated prompt"),
    "loss_after": (F32, "the same of the mitigated prompt, under the same mask"),
    "magnitude_before": (F32, "||d||_2 at the first step"),
    "magnitude_after": (F32, "the same, mitigated"),
    "ld_before": (F32, "ld at the first step under the BE mask of the final step (the paper's first-step LD)"),
    "ld_after": (F32, "the same, mitigated, under the BE mask of the mitigated trajectory"),
    "reference_id": (pa.int64(), "the training picture confirm's verdict rests on, id in the index"),
    "reference_key": (pa.string(), "its key"),
    "sscd_before": (F32, "cosine of the SSCD descriptors of the image and that picture; a copy when > 0.5"),
    "sscd_after": (F32, "the same, mitigated"),
    "ls_norm_before": (F32, "-1[sscd < 0.5] ||(xhat - x) m||_2 / mean(m), BE mask of the unmitigated trajectory"),
    "ls_norm_after": (F32, "the same, mitigated, under the same mask"),
    "ls_energy_before": (F32, "the same under the energy mask of the unmitigated trajectory"),
    "ls_energy_after": (F32, "the same, mitigated, under the same mask"),
    "distance_before": (F32, "||(xhat - x) m||_2 / mean(m) under confirm's match mask, not gated"),
    "distance_after": (F32, "the same, mitigated, under the same mask"),
    "verdict_before": (pa.string(), "global, local or none, against that picture alone"),
    "verdict_after": (pa.string(), "the same, mitigated, by the same thresholds"),
    "alignment_before": (F32, "cosine of image and caption by CLIP (CLIP score); null without --clip"),
    "alignment_after": (F32, "the same, mitigated"),
    "image_before": (pa.binary(), "the unmitigated image, PNG"),
    "image_after": (pa.binary(), "the mitigated image from the same noise, PNG"),
}
"""Columns of mitigated/, in order: one row an image."""


@dataclass(frozen=True)
class MitigateConfig:
    """Which copies to mitigate, and how. Every field is a flag of `be-audit mitigate`."""

    run: str = option(DEFAULT_RUN, "Run folder with a confirm.", argument=True, envvar="BE_AUDIT_RUN")
    prompt: str | None = option(None, "Mitigate this prompt instead, without a run.")
    loss: str = option("ld", "What is brought down: ld, or magnitude (the baseline).", choices=("ld", "magnitude"))
    mask: str = option("final", "Mask of ld, of the unmitigated trajectory.", choices=tuple(MATCH_MASKS))
    target: float | None = option(
        None,
        "Stop at this loss; default the median of the run's captions (--prompt: 0.15 of its own).",
        min=0.0,
    )
    threshold: float | None = option(None, "Trigger: mitigate only what scores above this; default all.")
    thresholds: str | None = option(None, "Trigger: the threshold in this file (be-audit calibrate).")
    learning_rate: float = option(0.05, "Of AdamW.", min=0.0)
    iterations: int = option(10, "Updates of an embedding at most.", min=0)
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    top_k: int | None = option(None, "Mitigate this many captions, global copies first; default all copies.", min=1)
    num_images: int | None = option(None, "Images a caption; default as many as confirm made.", min=1)
    index: str | None = option(
        None, "Index of the training pictures; default the one confirm used.", envvar="BE_AUDIT_INDEX"
    )
    sscd: str | None = option(None, "Copy descriptor file; default the one the index was made with.")
    clip: str | None = option(None, "CLIPModel folder for text alignment; the testbed has its own.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    batch_size: int = option(8, "Images at a time; halved when memory runs out.", min=1)
    engine: str = option("local", "Where shards run.", choices=("local", "ray"))
    workers: int = option(0, "Worker processes; 0 is one a GPU.", min=0)
    max_error_rate: float = option(
        0.05, "A shard with a larger share of failed images is not committed.", min=0.0, max=1.0
    )
    max_shard_retries: int = option(3, "Tries of a shard before it is given up.", min=1)
    replace: bool = option(False, "Discard an earlier mitigation that was begun differently.")
    output: str = option("be-audit-mitigate.png", "With --prompt: picture of before and after.", short="-o")
    model: str = option(DEFAULT_MODEL, "With --prompt: hub id or diffusers folder; `testbed` is the embedded model.")
    revision: str | None = option(None, "With --prompt: revision of a hub model.")
    steps: int = option(50, "With --prompt: sampling steps.", min=1)
    guidance_scale: float = option(7.5, "With --prompt: classifier-free guidance scale.")
    seed: int = option(0, "With --prompt: seed of the noise bank.", min=0)
    dtype: str = option(
        "auto", "With --prompt: auto is float16 on CUDA.", choices=("auto", "float32", "float16", "bfloat16")
    )


@dataclass(frozen=True)
class MitigateSummary:
    """What a mitigation did; counts and means are over images.

    Attributes:
        captions, images: mitigated or left as they are. untriggered: left, below the trigger. reached: loss_after at
            most the target. target: of the loss.
        verdicts: name -> (before, after), against the same training pictures.
        means: of ld, magnitude, sscd, alignment (before, after), over the triggered images; alignment only with a CLIP.
        failed: rows with an error. quarantined: shards given up. unconfirmed: shards confirm has not done.
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
    committed_now: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed rows or shards."""
        return 3 if self.failed or self.quarantined or self.unconfirmed else 0


def mitigate(config: MitigateConfig, stop: Stop | None = None) -> MitigateSummary:
    """Mitigate a run's confirmed copies, or go on with a mitigation that was begun.

    Raises:
        AuditError: no run, nothing confirmed, another index than confirm's, or a mitigation begun differently.
        Drained: `stop` asked to.
    """
    from audit.jobs import run_stage

    started = time.monotonic()
    run = Run.open(config.run)
    stage, unconfirmed = _begin(run, config)
    run.folder.sweep()
    rows = collections.Counter(stage.items["shard"].to_pylist())
    done = stage.ledger.done(stage.shards)
    todo = [shard for shard in stage.shards if shard not in done]
    outcome = run_stage(run, "mitigate", stage.ledger, todo, config, stop, rows, "images", done)
    facts = stage.facts["fingerprint"]
    counted = _count(read_stage(run, "mitigate", [name for name in MITIGATED_COLUMNS if not name.startswith("image_")]))
    return MitigateSummary(
        run=config.run,
        loss=facts["loss"],
        target=facts["target"],
        quarantined=outcome.quarantined,
        unconfirmed=unconfirmed,
        committed_now=len(outcome.committed),
        seconds=time.monotonic() - started,
        **counted,
    )


def resume_mitigate(run: Run, stop: Stop | None = None) -> MitigateSummary | None:
    """Go on with a run's mitigation as it was begun (verify --repair). None when there was none."""
    stage = Stage.find(run, "mitigate")
    if stage is None:
        return None
    return mitigate(replace(config_of(MitigateConfig, stage.facts["config"]), run=run.url, replace=False), stop)


def _begin(run: Run, config: MitigateConfig) -> tuple[Stage, int]:
    """Pick the copies and begin the stage; shards are confirm's. Also how many of those confirm has not done."""
    confirmed, trajectories = Stage.find(run, "confirm"), Stage.find(run, "trajectories")
    found = None if confirmed is None else dataset(run, "confirm")
    if confirmed is None or trajectories is None or found is None:
        raise AuditError(f"{run.url}: nothing is confirmed yet: give `be-audit confirm {run.url}` first")
    table = found.to_table(columns=["row_id", "caption", "verdict", "candidate_rank"])
    table = table.filter(pc.is_in(table["verdict"], pa.array(COPIES)))
    if not table.num_rows:
        raise AuditError(f"{run.url}: confirm found no copies: nothing to mitigate")
    table = table.sort_by([("verdict", "ascending"), ("candidate_rank", "ascending")])  # global before local
    table = table.slice(0, config.top_k)
    shard_of = dict(zip(*(confirmed.items[name].to_pylist() for name in ("row_id", "shard")), strict=True))
    shards = pa.array([shard_of[row_id] for row_id in table["row_id"].to_pylist()], pa.int32())
    chosen = table.select(["row_id", "caption"]).append_column("shard", shards)
    made = int(trajectories.facts["fingerprint"]["num_images"])
    num_images = config.num_images or made
    if num_images > made:
        raise AuditError(f"--num-images {num_images}: confirm made {made} a caption; give at most that")
    facts = confirmed.facts["fingerprint"]
    index = open_index(config.index or confirmed.facts["config"]["index"])
    if index.fingerprint != facts["index"]:
        raise AuditError(f"--index {index.folder.url}: not the index confirm used; name that one")
    index.load_descriptor(config.sscd, config.device)
    clip = find_clip(config.clip, run.config["model"])
    threshold, by = config.threshold, trigger_column(config.loss, config.mask)
    if config.thresholds is not None:
        from audit.calibrate import load_thresholds

        threshold = load_thresholds(config.thresholds, run).threshold(by)
    target = config.target
    if target is None:
        # ld under an attention mask that points nowhere is the magnitude: the nearest that an energy scan has
        near = "magnitude" if by == "ld" and run.fingerprint["mask"] == "energy" else by
        scores = read_scores(run, ["status", "duplicate_of", near])
        scores = scores.filter(pc.and_(pc.equal(scores["status"], "ok"), pc.is_null(scores["duplicate_of"])))
        target = float(np.nanmedian(scores[near].to_numpy()))
    fingerprint = {
        "confirm": confirmed.facts["digest"],
        "captions": chosen.num_rows,
        "rows": digest({"row_ids": chosen["row_id"].to_pylist()}),
        "num_images": num_images,
        "target": target,
        "threshold": threshold,
        "clip": None if clip is None else _folder_sha256(clip),
        **{name: getattr(config, name) for name in ("loss", "mask", "learning_rate", "iterations")},
    }
    if config.loss == "magnitude":
        del fingerprint["mask"]
    record = asdict(replace(config, target=target, threshold=threshold, thresholds=None, clip=clip))
    record["index"] = index.folder.url
    items = with_images(chosen, num_images)
    stage = Stage.begin(run, "mitigate", "mitigated", fingerprint, items, config.replace, record)
    return stage, len(set(confirmed.shards) - set(confirmed.ledger.done(confirmed.shards)))


def trigger_column(loss: str, mask: str) -> str:
    """Score column that triggers (the one calibrated): the first-step score nearest to the loss."""
    if loss == "magnitude":
        return "magnitude"
    return "ld_energy" if mask == "energy" else "ld"


def find_clip(clip: str | None, model: str) -> str | None:
    """The CLIP folder as an absolute path: as given, or the testbed's own for the testbed; None for no alignment.

    Raises:
        AuditError: no CLIPModel there.
    """
    from audit import testbed

    if clip is None:
        return str(testbed.CLIP) if model == "testbed" else None
    if not (Path(clip).expanduser() / "config.json").is_file():
        raise AuditError(f"--clip {clip}: no config.json in it; give the folder of a transformers CLIPModel")
    return os.path.abspath(os.path.expanduser(clip))


def open_clip(clip: str | None, device: str) -> ClipScore | None:
    """The loaded CLIP of `find_clip`'s folder; ModelError as AuditError."""
    from pipelines.alignment import load_clip
    from pipelines.loading import ModelError

    try:
        return None if clip is None else load_clip(clip, device)
    except ModelError as error:
        raise AuditError(f"--clip: {error}") from error


def _folder_sha256(folder: str) -> str:
    total = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            total.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    total.update(chunk)
    return total.hexdigest()


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


def summary_lines(done: MitigateSummary) -> list[str]:
    """The summary for people."""
    moved = done.images - done.untriggered - done.failed
    lines = [
        f"{done.run}: {done.captions} captions, {done.images} images: {moved} mitigated, {done.untriggered} below the "
        f"trigger; {done.reached} reached {done.loss} <= {done.target:.4g} ({done.seconds:.1f} s)."
    ]
    verdicts = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in done.verdicts.items())
    lines.append(f"Against the same training pictures: {verdicts}.")
    if done.means:
        means = ", ".join(f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in done.means.items())
        lines.append(f"Means of the mitigated: {means}.")
    if moved and "alignment" not in done.means:
        lines.append("Text alignment was not measured: give a CLIPModel folder with --clip.")
    if done.failed:
        lines.append(f"{done.failed} images failed: see the column error of mitigated/")
    if done.unconfirmed:
        lines.append(f"{done.unconfirmed} shards are not confirmed and were left out: be-audit status {done.run}")
    return lines
