"""The default target of a mitigation: what the same loss is on captions that copy nothing."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.mitigation.config import MASK_LOSS, MovingConfig
from audit.run.read import dataset, read_distinct, read_rows
from audit.run.run import Run
from audit.run.schema import TRAJECTORY_COLUMNS
from audit.run.stage import TRAJECTORIES, Stage
from audit.scores.model import load_run_model
from audit.scores.trajectories import open_sampler

CLEAN_CAPTIONS = 16  # sampled where the run has no such loss of clean captions


def clean_target(run: Run, trajectories: Stage, config: MovingConfig, mask: str, compile: bool = False) -> float:
    """Median of the loss over clean captions of a run: the same formula, under the same mask, at the same step.

    Of the clean captions confirm generated images of (`--clean`, `--null-captions`) where it did; else of the scan,
    whose captions are no candidates, where it has this very loss; else of CLEAN_CAPTIONS of those, sampled here.

    Args:
        run: the run.
        trajectories: of confirm, as it was begun.
        config: loss and device. compile: as the stage that follows, which shares the model.
        mask: of the loss, as it is settled for the run's model.
    Raises:
        AuditError: every caption of the run is a candidate.
    """
    column = "magnitude" if config.loss == "magnitude" else MASK_LOSS[mask]
    # 1. what confirm generated
    clean = trajectories.items.filter(trajectories.items["clean"])["row_id"]
    made = dataset(run, TRAJECTORIES)
    if len(clean) and made is not None:
        chosen = pc.field("row_id").isin(clean.unique()) & pc.field("error").is_null()
        values = made.to_table(columns=[column], filter=chosen)[column]
        if len(values):
            return float(np.median(values.to_numpy()))
    # 2. what the scan scored: the same loss under another name
    scanned = MASK_LOSS.get(run.fingerprint.mask)  # a model without attention masks has none
    same = {"magnitude": "magnitude", "ld_energy": "ld_energy", scanned: "ld"}.get(column)
    scores = read_distinct(run, ["row_id", *([same] if same else [])], first_look=True)  # an image has one noise
    suspects = trajectories.items["row_id"].combine_chunks()
    scores = scores.filter(pc.invert(pc.is_in(scores["row_id"], suspects)))
    if not scores.num_rows:
        raise AuditError(f"{run.url}: every caption of it is a candidate, none is known to be clean: give --target")
    if same:
        return float(np.nanmedian(scores[same].to_numpy()))
    # 3. trajectories of some
    order = np.random.default_rng(run.fingerprint.seed).permutation(scores.num_rows)[:CLEAN_CAPTIONS]
    captions = read_rows(run, scores["row_id"].to_numpy()[np.sort(order)], ["caption"])["caption"].to_pylist()
    sampler = open_sampler(run.fingerprint, load_run_model(run, config.device, compile), 1, config.batch_size)
    found = sampler(captions, [0] * len(captions), decode=False)
    assert column in TRAJECTORY_COLUMNS
    first = {**found.first, **found.windows()}
    if "ld" in found.first:
        first["ld_first_mask"] = found.first["ld"]
    return float(np.nanmedian(first[column]))
