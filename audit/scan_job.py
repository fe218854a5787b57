"""One shard of a scan: read, score, write, commit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from audit.captions import is_empty, read_shard
from audit.commits import Commit
from audit.engines import ShardFailed, allowed_failures
from audit.run import Run, score_file
from audit.schema import SCORE_COLUMNS, mask_type, pack_mask_bits, scores_schema, tensor_array
from audit.scoring import Scored, open_scorer, score_captions

if TYPE_CHECKING:
    from pipelines.loading import DiffusionModel


class ScanJob:
    """Scan of one run with its model loaded: read, score, write, commit.

    Args:
        run: the run. model: the loaded model. batch_size: latents at a time.
        max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    def __init__(self, run: Run, model: DiffusionModel, batch_size: int, max_error_rate: float) -> None:
        self.run, self.ledger, self.fingerprint = run, run.scan, run.fingerprint
        self.max_error_rate = max_error_rate
        self.scorer = open_scorer(self.fingerprint, model, batch_size)
        self.mask_type = mask_type(self.fingerprint["masks"], *model.latent_shape[1:])
        from pipelines import MaskSource

        self.mask_source = MaskSource(
            self.fingerprint["mask"], self.fingerprint["mask_token"], tuple(self.fingerprint["mask_layers"])
        ).describe()

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit:
        clock = [time.monotonic()]
        rows = read_shard(self.run.plan, shard, self.run.folder)
        duplicate_of = self.run.plan.duplicates(shard)
        empty = is_empty(rows["caption"])
        own = np.flatnonzero(~empty & (duplicate_of < 0))
        clock.append(time.monotonic())
        captions = rows["caption"].take(pa.array(own)).to_pylist()
        scored = score_captions(self.scorer, captions, on_rows)
        clock.append(time.monotonic())
        if len(scored.errors) > allowed_failures(self.max_error_rate, len(own)):
            first = next(iter(scored.errors.values()))
            raise ShardFailed(f"{len(scored.errors)} of {len(own)} captions failed, the first: {first}")
        table = self._table(shard, rows, duplicate_of, empty, own, scored)
        counts = {
            "ok": len(scored.rows),
            "error": len(scored.errors),
            "empty": int(empty.sum()),
            "duplicate": int((duplicate_of >= 0).sum()),
        }
        seconds = {
            "read": clock[1] - clock[0],
            "score": clock[2] - clock[1],
            "wall": time.monotonic() - clock[0],
        }
        return self.ledger.commit(shard, score_file(shard), table, counts, seconds)

    def _table(self, shard: int, rows: pa.Table, duplicate_of: Any, empty: Any, own: Any, scored: Scored) -> pa.Table:
        """A row for every input row; scores where there are some, nulls elsewhere."""
        length = rows.num_rows
        status = np.where(empty, "empty", "ok").astype(object)
        error = np.full(length, None, object)
        for place, reason in scored.errors.items():
            status[own[place]], error[own[place]] = "error", reason
        places = own[scored.rows]
        arrays: dict[str, pa.Array] = {
            "row_id": pa.array((np.int64(shard) << 32) | np.arange(length, dtype=np.int64)),
            "caption": rows["caption"],
            "status": pa.array(status, pa.string()),
            "error": pa.array(error, pa.string()),
            "duplicate_of": pa.array(duplicate_of, pa.int64(), mask=duplicate_of < 0),
            "mask_source": pa.array(np.full(length, self.mask_source, object), pa.string()),
            "refined": pa.array(np.zeros(length, bool)),
        }
        schema = scores_schema(self.mask_type, list(self.run.plan.keep_schema))
        for name, (kind, _) in SCORE_COLUMNS.items():
            if name == "mask" or (name in arrays and name not in scored.columns):
                continue
            arrays[name] = _spread(scored.columns.get(name), places, length, kind)
        if self.mask_type is not None:
            masks = scored.columns.get("mask", np.zeros((0, *self.mask_type.shape), np.float32))
            packed = pack_mask_bits(masks) if self.fingerprint["masks"] == "bits" and len(masks) else masks
            arrays["mask"] = tensor_array(packed, self.mask_type, places, length)
        for name in self.run.plan.keep_cols:
            arrays[name] = rows[name]
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def _spread(values: Any, places: Any, length: int, kind: pa.DataType) -> pa.Array:
    """Values at their places, null elsewhere and where a float is NaN."""
    if values is None or not len(places):
        return pa.nulls(length, kind)
    spread = np.zeros(length, values.dtype)
    null = np.ones(length, bool)
    spread[places] = values
    null[places] = np.isnan(values) if values.dtype.kind == "f" else False
    return pa.array(spread, mask=null).cast(kind)
