"""Sample the full trajectories of chosen rows and keep what proof needs: image, masks, scores of every step."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from audit.commits import Commit
from audit.engines import ShardFailed, allowed_failures
from audit.errors import AuditError, Drained
from audit.run import Run, Stage
from audit.schema import TRAJECTORY_COLUMNS, TRAJECTORY_MASKS, tensor_array

if TYPE_CHECKING:
    from pipelines import Trajectories
    from pipelines.loading import DiffusionModel


def open_sampler(fingerprint: dict[str, Any], model: DiffusionModel, num_images: int, batch_size: int) -> Any:
    """The sampler of a run: its seed, steps, guidance and mask source, with at least `num_images` noises."""
    from pipelines import MaskSource, TrajectorySampler

    try:
        return TrajectorySampler(
            model,
            MaskSource("final", fingerprint["mask_token"], tuple(fingerprint["mask_layers"])),
            num_noises=num_images,
            seed=fingerprint["seed"],
            steps=fingerprint["steps"],
            guidance_scale=fingerprint["guidance_scale"],
            batch_size=max(1, batch_size // 2),
        )
    except ValueError as error:
        raise AuditError(str(error)) from error


class TrajectoryJob:
    """Trajectories of a stage's rows (`row_id`, `caption`, `image_index`), one output row each.

    Args:
        run: the run. stage: `refine` or `trajectories`. model: loaded. batch_size: latents at a time.
        max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    def __init__(self, run: Run, stage: str, model: DiffusionModel, batch_size: int, max_error_rate: float) -> None:
        found = Stage.find(run, stage)
        if found is None:
            raise AuditError(f"{run.url}: stage {stage} was not begun")
        self.stage, self.ledger = found, found.ledger
        self.max_error_rate = max_error_rate
        num_images = int(found.facts["fingerprint"]["num_images"])
        self.sampler = open_sampler(run.fingerprint, model, num_images, batch_size)

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit:
        started = time.monotonic()
        items = self.stage.rows(shard)
        captions, noises = items["caption"].to_pylist(), items["image_index"].to_pylist()
        sampled, errors = self._sample(captions, noises, on_rows)
        sampling = time.monotonic() - started
        failed = [row for row, reason in enumerate(errors) if reason]
        if len(failed) > allowed_failures(self.max_error_rate, len(captions)):
            raise ShardFailed(f"{len(failed)} of {len(captions)} trajectories failed, the first: {errors[failed[0]]}")
        table = trajectory_table(items, sampled, errors)
        counts = {"ok": len(captions) - len(failed), "error": len(failed)}
        seconds = {"sample": sampling, "wall": time.monotonic() - started}
        return self.ledger.commit(shard, self.stage.file(shard), table, counts, seconds)

    def _sample(
        self, captions: list[str], noises: list[int], on_rows: Callable[[int], None]
    ) -> tuple[list[Trajectories | None], list[str | None]]:
        """All together, or, when that fails, one by one; of each row its trajectory or its error."""
        try:
            whole = self.sampler(captions, noises, on_batch=on_rows)
            found: list[Any] = [whole.row(row) for row in range(len(captions))]
        except (AuditError, Drained):
            raise
        except Exception:  # which row it was shows below
            found = []
            for caption, noise in zip(captions, noises, strict=True):
                try:
                    found.append(self.sampler([caption], [noise], on_batch=on_rows))
                except (AuditError, Drained):
                    raise
                except Exception as error:
                    found.append(f"{type(error).__name__}: {error}"[:500])
        sampled: list[Trajectories | None] = []
        errors: list[str | None] = []
        for each in found:
            if not isinstance(each, str) and not math.isfinite(float(each.magnitude_t.sum() + each.ld_t.sum())):
                each = "scores are not finite"
            sampled.append(None if isinstance(each, str) else each)
            errors.append(each if isinstance(each, str) else None)
        return sampled, errors


def trajectory_table(
    items: pa.Table, sampled: list[Trajectories | None], errors: list[str | None] | None = None
) -> pa.Table:
    """Rows of trajectories/ from the stage's items and one single-row Trajectories each (None for a failed one)."""
    rows = np.array([row for row, each in enumerate(sampled) if each is not None], np.int64)
    good = [each for each in sampled if each is not None]
    arrays: dict[str, pa.Array] = {name: items[name] for name in ("row_id", "image_index", "caption")}
    arrays["error"] = pa.array(errors or [None] * len(sampled), pa.string())
    arrays["image"] = pa.array(
        [None if each is None or each.images is None else encode_png(each.images[0]) for each in sampled], pa.binary()
    )
    singles = [{**vars(each), **each.windows()} for each in good]
    places = np.full(len(sampled), -1, np.int64)
    places[rows] = np.arange(len(rows))
    take = pa.array(places, mask=places < 0)
    fields = []
    for name, (kind, text) in TRAJECTORY_COLUMNS.items():
        if name in TRAJECTORY_MASKS:
            values = [getattr(each, name)[0] for each in good]
            shape = values[0].shape if values else (1, 1)
            kind = pa.fixed_shape_tensor(pa.float32(), shape)
            arrays[name] = tensor_array(np.stack(values) if values else np.zeros((0, 1, 1)), kind, rows, len(sampled))
        elif name in ("magnitude_t", "ld_t"):
            arrays[name] = pa.array([getattr(each, name)[0] for each in good], kind).take(take)
        elif name not in arrays:
            values = [scalars[name][0] for scalars in singles]
            arrays[name] = pa.array(np.array(values, np.float32), kind, from_pandas=True).take(take)
        fields.append(pa.field(name, kind, metadata={"description": text}))
    schema = pa.schema(fields)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def encode_png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG as [H, W, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
