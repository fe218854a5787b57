"""The steps of a scan's shard: read its captions, score them, write and commit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from audit.base.commits import Commit
from audit.captions import is_empty, read_shard
from audit.engines.failures import check_failures
from audit.engines.job import JobSpec, Took
from audit.run.run import Run
from audit.run.schema import SCORE_MASKS, mask_type, pack_mask_bits, scores_schema, tensor_array
from audit.run.stage import NULL_MAPS, SCAN, Stage
from audit.scores.model import load_run_model
from audit.scores.null_maps import read_null_maps
from audit.scores.scorer import Scored, mask_source, open_scorer, score_captions
from audit.scores.self_check import check_scorer

if TYPE_CHECKING:
    from pipelines import DiffusionModel
    from pipelines.batching import BatchSize


def open_job(spec: JobSpec) -> ScanJob:
    """The scan of a run, with its model loaded. Raises AuditError as `load_run_model`."""
    run = Run.open(spec.run)
    return ScanJob(run, load_run_model(run, spec.device, spec.compile), spec.batch_size, spec.max_error_rate)


def open_checked_job(spec: JobSpec) -> ScanJob:
    """The same, once its scorer agrees with the plain formulas on this device. Raises AuditError where it does not."""
    job = open_job(spec)
    if job.run.fingerprint.mask != "final":
        check_scorer(job.run, job.model, job.scorer)
    return job


@dataclass(frozen=True)
class ShardRows:
    """The input rows of a shard.

    Attributes:
        table: `caption` and the columns carried through, [n]. duplicate_of: row_id of the same caption earlier on, or
            -1, [n]. empty: there is no caption, [n].
    """

    table: pa.Table
    duplicate_of: NDArray[np.int64]
    empty: NDArray[np.bool_]

    @functools.cached_property
    def own(self) -> NDArray[np.int64]:
        """Places of the captions to score."""
        return np.flatnonzero(~self.empty & (self.duplicate_of < 0))

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions to score."""
        return list(self.table["caption"].take(pa.array(self.own)).to_pylist())


class ScanJob:
    """Scan of one run with its model loaded.

    Args:
        run: the run. model: the loaded model. batch_size: latents at a time.
        max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    computing = "score"

    def __init__(self, run: Run, model: DiffusionModel, batch_size: BatchSize, max_error_rate: float) -> None:
        self.run, self.stage, self.max_error_rate = run, Stage.open(run, SCAN), max_error_rate
        self.ledger, self.model = self.stage.ledger, model
        self.scorer = open_scorer(run.fingerprint, model, batch_size, read_null_maps(run, NULL_MAPS))
        self.mask_type = mask_type(run.fingerprint.store_masks, *model.latent_shape[1:])
        self.mask_source = mask_source(run.fingerprint).describe()
        if self.mask_source == "none":
            self.mask_source = f"none: {model.no_mask}"

    def read(self, shard: int) -> ShardRows:
        table = read_shard(self.run.plan, shard, self.run.folder)
        rows = ShardRows(table, self.run.plan.duplicates(shard), is_empty(table["caption"]))
        self.scorer.expect(rows.captions)
        return rows

    def compute(self, shard: int, rows: ShardRows, on_rows: Callable[[int], None]) -> tuple[ShardRows, Scored]:
        scored = score_captions(self.scorer, rows.captions, on_rows)
        check_failures(list(scored.errors.values()), len(rows.captions), self.max_error_rate, "captions")
        return rows, scored

    def write(self, shard: int, found: tuple[ShardRows, Scored], took: Took) -> Commit:
        rows, scored = found
        counts = {
            "ok": len(scored.rows),
            "error": len(scored.errors),
            "empty": int(rows.empty.sum()),
            "duplicate": int((rows.duplicate_of >= 0).sum()),
        }
        return self.ledger.commit(shard, self._table(shard, rows, scored), counts, took.seconds())

    def _table(self, shard: int, rows: ShardRows, scored: Scored) -> pa.Table:
        """A row for every input row; scores where there are some, nulls elsewhere.

        Raises:
            KeyError: a scored value without a column in audit/run/schema.py.
        """
        length, own, duplicate_of = rows.table.num_rows, rows.own, rows.duplicate_of
        status = np.where(rows.empty, "empty", "ok").astype(object)
        error = np.full(length, None, object)
        for place, reason in scored.errors.items():
            status[own[place]], error[own[place]] = "error", reason
        places = own[scored.rows]
        arrays: dict[str, pa.Array] = {
            "row_id": pa.array((np.int64(shard) << 32) | np.arange(length, dtype=np.int64)),
            "caption": rows.table["caption"],
            "status": pa.array(status, pa.string()),
            "error": pa.array(error, pa.string()),
            "duplicate_of": pa.array(duplicate_of, pa.int64(), mask=duplicate_of < 0),
            "mask_source": pa.array(np.full(length, self.mask_source, object), pa.string()),
            "refined": pa.array(np.zeros(length, bool)),
            **{name: rows.table[name] for name in self.run.plan.keep_cols},
        }
        schema = scores_schema(self.mask_type, list(self.run.plan.keep_schema))
        unknown = set(scored.columns) - {*schema.names, *SCORE_MASKS}
        if unknown:
            raise KeyError(f"no column for {', '.join(sorted(unknown))}: add it to audit/run/schema.py")
        num_noises = np.full(len(places), self.run.fingerprint.num_noises, np.int32)
        arrays["num_noises"] = _spread(num_noises, places, length, pa.int32())
        for field in schema:
            values = scored.columns.get(field.name)
            if field.name in SCORE_MASKS:
                arrays[field.name] = self._masks(values, places, length)
            elif values is not None or field.name not in arrays:
                arrays[field.name] = _spread(values, places, length, field.type)
        return pa.table([arrays[name] for name in schema.names], schema=schema)

    def _masks(self, masks: NDArray[np.float32] | None, places: NDArray[np.int64], length: int) -> pa.Array:
        """Masks [n, H, W] at their places as the column's type, null elsewhere."""
        kind = self.mask_type
        assert kind is not None
        if masks is None or not len(masks):
            return tensor_array(np.zeros((0, *kind.shape)), kind, places[:0], length)
        packed = pack_mask_bits(masks) if self.run.fingerprint.store_masks == "bits" else masks
        return tensor_array(packed, kind, places, length)


def _spread(values: NDArray[np.generic] | None, places: NDArray[np.int64], length: int, kind: pa.DataType) -> pa.Array:
    """Values at their places, null elsewhere and where a float is NaN."""
    if values is None or not len(places):
        return pa.nulls(length, kind)
    spread = np.zeros(length, values.dtype)
    null = np.ones(length, bool)
    spread[places] = values
    null[places] = np.isnan(values) if values.dtype.kind == "f" else False
    return pa.array(spread, mask=null).cast(kind)
