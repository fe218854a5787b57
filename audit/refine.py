"""`scan --refine FRACTION`: the full trajectory of the best-scored rows, a second stage of the same job."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.engines.local import Outcome
from audit.errors import AuditError
from audit.run import Run, Stage
from audit.stopping import Stop
from audit.tables import read_rows, read_scores


def best_rows(
    run: Run, by: str, top_k: int | None = None, fraction: float | None = None, threshold: float | None = None
) -> pa.Table:
    """The best-scored distinct captions of a run, best first: row_id, caption, score, rank.

    Args:
        by: score column, higher is more suspicious. top_k, fraction (of the scored captions), threshold (score >
            threshold): which; every one given must hold.

    Raises:
        AuditError: a column the run does not have values in.
    """
    from audit.schema import DETECTORS, WINDOWS

    if by not in (*DETECTORS, *WINDOWS):
        raise AuditError(f"--by {by}: no score column; there are {', '.join((*DETECTORS, *WINDOWS))}")
    table = read_scores(run, ["row_id", "status", "duplicate_of", by])
    keep = pc.and_(pc.equal(table["status"], "ok"), pc.and_(pc.is_null(table["duplicate_of"]), pc.is_valid(table[by])))
    table = table.filter(keep)
    if not table.num_rows:
        raise AuditError(f"--by {by}: the run has no scores in this column")
    table = table.select(["row_id", by]).sort_by([(by, "descending"), ("row_id", "ascending")])
    count = table.num_rows
    if fraction is not None:
        count = min(count, math.ceil(round(fraction * table.num_rows, 9)))
    if top_k is not None:
        count = min(count, top_k)
    if threshold is not None:
        count = min(count, pc.sum(pc.greater(table[by], threshold)).as_py() or 0)
    table = table.slice(0, count)
    return pa.table(
        {
            "row_id": table["row_id"],
            "caption": read_rows(run, table["row_id"].to_numpy(), ["caption"])["caption"],
            "score": table[by].cast(pa.float32()),
            "rank": pa.array(np.arange(count), pa.int32()),
        }
    )


def with_images(rows: pa.Table, num_images: int) -> pa.Table:
    """Every row once an image: `image_index` 0 to num_images - 1."""
    repeated = rows.take(pa.array(np.repeat(np.arange(rows.num_rows), num_images)))
    return repeated.append_column("image_index", pa.array(np.tile(np.arange(num_images), rows.num_rows), pa.int32()))


def begin_refine(run: Run, fraction: float, by: str, replace: bool = False) -> Stage:
    """Choose the rows and begin the stage, or find the one begun; a shard holds the rows of one scan shard.

    `replace`: discard one that was begun differently.
    """
    fingerprint = {"fraction": fraction, "by": by, "num_images": run.fingerprint["num_noises"]}
    chosen = best_rows(run, by, fraction=fraction).sort_by("row_id")
    items = with_images(chosen, fingerprint["num_images"])
    shards = pa.array(items["row_id"].to_numpy() >> 32, pa.int32())
    return Stage.begin(run, "refine", "refined", fingerprint, items.append_column("shard", shards), replace)


def run_refine(run: Run, config: Any, rank: int, world: int, stop: Stop | None) -> tuple[Stage, Outcome]:
    """Begin or go on with the refine stage; the scan must be complete.

    Args:
        config: a ScanConfig. rank, world: this machine does every world-th shard.
    """
    from audit.jobs import run_stage

    stage = begin_refine(run, config.refine, config.refine_by, config.replace)
    rows = dict(collections.Counter(stage.items["shard"].to_pylist()))
    done = stage.ledger.done(stage.shards)
    todo = [shard for shard in stage.shards[rank::world] if shard not in done]
    return stage, run_stage(run, "refine", stage.ledger, todo, config, stop, rows, "trajectories", done)
