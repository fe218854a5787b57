"""`scan --second-look FRACTION`: more noises for the best-scored rows, a stage of the same job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from audit.base.commits import Commit
from audit.base.stopping import Stop
from audit.engines.failures import check_failures
from audit.engines.job import JobSpec, Took
from audit.engines.launch import EngineConfig
from audit.engines.retries import Outcome
from audit.run.read import read_rows
from audit.run.run import Run
from audit.run.schema import LOOKED_AT, SECOND_LOOK_COLUMNS
from audit.run.select import SCORE_OF_SIZE_HELP, best_scores, score_of_size
from audit.run.stage import SECOND_LOOK, SECOND_NULL_MAPS, Stage, run_stage
from audit.scores.model import load_run_model
from audit.scores.null_maps import make_null_maps, read_null_maps
from audit.scores.scorer import Scored, open_scorer, score_captions

if TYPE_CHECKING:
    from pipelines import DiffusionModel
    from pipelines.batching import BatchSize

SECOND_LOOK_NOISES = 4
"""Noises of a second look, the first ones included."""
DEFAULT_SCORE_HELP = f"that of the second look, without one {SCORE_OF_SIZE_HELP}"


@dataclass(frozen=True)
class SecondLookFingerprint:
    """What a second look depends on: the fraction, the score it was chosen by, its noises and their null maps."""

    fraction: float
    by: str
    num_noises: int
    second_null_maps: str


def begin_second_look(
    run: Run, fraction: float, by: str, num_noises: int, config: EngineConfig, stop: Stop | None, replace: bool = False
) -> Stage:
    """Choose the rows by their first scores and begin the stage, or find the one begun; a shard for a scan shard.

    Args:
        num_noises: of the bank that the rows' scores will be means over, the first ones included.
        replace: discard one that was begun differently, and what rests on it.

    Raises:
        AuditError: begun before with other flags. Drained, Broken: as `make_null_maps`.
    """
    first = run.fingerprint.num_noises
    begun = Stage.find(run, SECOND_LOOK)
    if begun is not None and not replace and begun.fingerprint(SecondLookFingerprint).num_noises != num_noises:
        made = begun.fingerprint(SecondLookFingerprint).second_null_maps  # refused before they are touched
        Stage.begin(run, SECOND_LOOK, SecondLookFingerprint(fraction, by, num_noises, made), begun.items)
    maps = make_null_maps(run, SECOND_NULL_MAPS, range(first, num_noises), config, stop)
    assert maps is not None, "rows were scored, so there is a sample"
    fingerprint = SecondLookFingerprint(fraction, by, num_noises, maps.facts.digest)
    if begun is not None and not begun.differs(fingerprint) and not begun.problems():
        return begun
    ids = np.sort(best_scores(run, by, fraction=fraction, first_look=True)["row_id"].to_numpy())
    items = read_rows(run, ids, ["row_id", "caption", *LOOKED_AT], first_look=True)
    items = items.append_column("shard", pa.array(ids >> 32, pa.int32()))
    return Stage.begin(run, SECOND_LOOK, fingerprint, items, replace=replace)


def run_second_look(stage: Stage, config: EngineConfig, rank: int, world: int, stop: Stop | None) -> Outcome:
    """Go on with the stage: all of its shards, this machine's (`rank` of `world`) first.

    Machines that have done their part of the scan have ended by then, all but the last: nobody waits for the others.
    """
    mine = set(stage.shards[rank::world])
    return run_stage(stage, sorted(stage.missing(), key=lambda shard: shard not in mine), config, stop)


def looks_noises(run: Run) -> int | None:
    """Noises that the rows of a run's second look are scored with; None where it had none."""
    stage = Stage.find(run, SECOND_LOOK)
    return None if stage is None else stage.fingerprint(SecondLookFingerprint).num_noises


def default_score(run: Run) -> str:
    """The score that is gone by where none is named: the one that chose which rows have the means of more noises."""
    stage = Stage.find(run, SECOND_LOOK)
    return score_of_size(run) if stage is None else stage.fingerprint(SecondLookFingerprint).by


def open_job(spec: JobSpec) -> SecondLookJob:
    """The second look of a run, with its model loaded. Raises AuditError as `load_run_model`."""
    run = Run.open(spec.run)
    stage = Stage.open(run, SECOND_LOOK)
    return SecondLookJob(stage, load_run_model(run, spec.device, spec.compile), spec.batch_size, spec.max_error_rate)


class SecondLookJob:
    """Scores of a stage's rows under the noises that the scan did not use, and the mean over all of them.

    Args:
        stage: as it was begun; its rows hold their first scores. model: loaded. batch_size: latents at a time.
        max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    computing = "score"

    def __init__(self, stage: Stage, model: DiffusionModel, batch_size: BatchSize, max_error_rate: float) -> None:
        self.stage, self.ledger, self.max_error_rate = stage, stage.ledger, max_error_rate
        run, asked = stage.run, stage.fingerprint(SecondLookFingerprint)
        self.first, self.count = run.fingerprint.num_noises, asked.num_noises
        maps = read_null_maps(run, SECOND_NULL_MAPS)
        self.scorer = open_scorer(run.fingerprint, model, batch_size, maps, range(self.first, self.count))

    def read(self, shard: int) -> pa.Table:
        items = self.stage.rows(shard)
        self.scorer.expect(items["caption"].to_pylist())
        return items

    def compute(self, shard: int, items: pa.Table, on_rows: Callable[[int], None]) -> tuple[pa.Table, Scored]:
        scored = score_captions(self.scorer, items["caption"].to_pylist(), on_rows)
        check_failures(list(scored.errors.values()), items.num_rows, self.max_error_rate, "captions")
        return items, scored

    def write(self, shard: int, found: tuple[pa.Table, Scored], took: Took) -> Commit:
        items, scored = found
        errors = np.full(items.num_rows, None, object)
        errors[list(scored.errors)] = list(scored.errors.values())
        arrays: dict[str, pa.Array] = {name: items[name] for name in ("row_id", "caption")}
        arrays["error"] = pa.array(errors, pa.string())
        arrays["num_noises"] = pa.array(np.full(items.num_rows, self.count), pa.int32(), mask=errors != None)  # noqa: E711
        firsts = {
            name: items[name].to_numpy()[scored.rows].astype(np.float64)
            for name in LOOKED_AT[1:]
            if name in items.schema.names
        }  # a score that is younger than the stage has none
        for name, values in means(firsts, scored.columns, self.first, self.count).items():
            column = np.full(items.num_rows, np.nan, np.float32)
            column[scored.rows] = values
            arrays[name] = pa.array(column, from_pandas=True)
        fields = [
            pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in SECOND_LOOK_COLUMNS.items()
        ]
        columns = [arrays.get(field.name, pa.nulls(items.num_rows, field.type)) for field in fields]
        table = pa.table(columns, schema=pa.schema(fields))
        counts = {"ok": len(scored.rows), "error": len(scored.errors)}
        return self.ledger.commit(shard, table, counts, took.seconds())


def means(
    firsts: dict[str, NDArray[np.float64]], seconds: dict[str, NDArray[np.float32]], first: int, count: int
) -> dict[str, NDArray[np.float64]]:
    """Means over all noises from those over the first and over the others; NaN where either has none.

    Args:
        firsts: name -> [n], means over `first` noises. seconds: the same over the other `count - first`.
    Returns:
        name -> [n]; `ld_std` is the deviation over all noises, from both means and deviations.
    """
    share = first / count
    found = {
        name: share * values + (1 - share) * np.asarray(seconds.get(name, np.nan), np.float64)
        for name, values in firsts.items()
        if name != "ld_std"
    }
    if "ld_std" in firsts:
        within = share * firsts["ld_std"] ** 2
        within = within + (1 - share) * np.asarray(seconds.get("ld_std", np.nan), np.float64) ** 2
        apart = firsts["ld"] - np.asarray(seconds.get("ld", np.nan), np.float64)
        found["ld_std"] = np.sqrt(within + share * (1 - share) * apart**2)
    return found
