"""`scan --refine FRACTION`: the full trajectory of the best-scored rows, a second stage of the same job."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from audit.base.stopping import Stop
from audit.engines.launch import EngineConfig
from audit.engines.retries import Outcome
from audit.run.run import Run
from audit.run.select import best_rows, with_images
from audit.run.stage import REFINE, SECOND_LOOK, Stage, run_stage


@dataclass(frozen=True)
class RefineFingerprint:
    """What a refinement depends on: the fraction, the score it was chosen by, trajectories a row.

    second_look: digest of the second look whose scores they were chosen by; null without one.
    """

    fraction: float
    by: str
    num_images: int
    second_look: str | None


def begin_refine(run: Run, fraction: float, by: str, replace: bool = False) -> Stage:
    """Choose the rows and begin the stage, or find the one begun; a shard holds the rows of one scan shard.

    `replace`: discard one that was begun differently.
    """
    look = Stage.find(run, SECOND_LOOK)
    fingerprint = RefineFingerprint(
        fraction, by, run.fingerprint.num_noises, None if look is None else look.facts.digest
    )
    chosen = best_rows(run, by, fraction=fraction).sort_by("row_id")
    items = with_images(chosen, fingerprint.num_images)
    shards = pa.array(items["row_id"].to_numpy() >> 32, pa.int32())
    return Stage.begin(run, REFINE, fingerprint, items.append_column("shard", shards), replace=replace)


def run_refine(stage: Stage, config: EngineConfig, rank: int, world: int, stop: Stop | None) -> Outcome:
    """Go on with the refine stage; this machine (`rank`) does every `world`-th shard."""
    missing = set(stage.missing())
    return run_stage(stage, [shard for shard in stage.shards[rank::world] if shard in missing], config, stop)
