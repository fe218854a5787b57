"""Sample the full trajectories of chosen rows and keep what proof needs: image, masks, scores of every step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from audit.base.commits import Commit
from audit.base.errors import AuditError
from audit.base.facts import read_facts
from audit.engines.failures import check_failures, together_or_alone
from audit.engines.job import JobSpec, Took
from audit.run.run import Fingerprint, Run
from audit.run.schema import TRAJECTORY_COLUMNS, TRAJECTORY_MASKS, tensor_array
from audit.run.stage import REFINE, TRAJECTORIES, Stage, StageKind
from audit.scores.model import load_run_model

if TYPE_CHECKING:
    from pipelines import DiffusionModel, Trajectories, TrajectorySampler
    from pipelines.batching import BatchSize

NOT_FINITE = "scores are not finite"
Sampled = list["Trajectories | str"]  # of each row a single-row Trajectories, or why there is none


@dataclass(frozen=True)
class Images:
    """How many trajectories a row has: what every stage of trajectories says in its fingerprint."""

    num_images: int


def open_refine(spec: JobSpec) -> TrajectoryJob:
    """The trajectories of a refinement, with the run's model loaded."""
    return _open(spec, REFINE)


def open_trajectories(spec: JobSpec) -> TrajectoryJob:
    """The trajectories of a confirm, with the run's model loaded."""
    return _open(spec, TRAJECTORIES)


def _open(spec: JobSpec, kind: StageKind) -> TrajectoryJob:
    run = Run.open(spec.run)
    stage = Stage.open(run, kind)
    return TrajectoryJob(stage, load_run_model(run, spec.device, spec.compile), spec.batch_size, spec.max_error_rate)


def open_sampler(
    fingerprint: Fingerprint, model: DiffusionModel, num_images: int, batch_size: BatchSize
) -> TrajectorySampler:
    """The sampler of a run: its seed, steps, guidance and mask source, with at least `num_images` noises."""
    from pipelines import MaskSource, TrajectorySampler
    from pipelines.batching import half

    try:
        return TrajectorySampler(
            model,
            MaskSource("final", fingerprint.mask_token, tuple(fingerprint.mask_layers)),
            num_noises=num_images,
            seed=fingerprint.seed,
            steps=fingerprint.steps,
            guidance_scale=fingerprint.guidance_scale,
            batch_size=half(batch_size),
        )
    except ValueError as error:
        raise AuditError(str(error)) from error


class TrajectoryJob:
    """Trajectories of a stage's rows (`row_id`, `caption`, `image_index`), one output row each.

    Args:
        stage: refine or trajectories, as it was begun. model: loaded. batch_size: latents at a time.
        max_error_rate: a shard with a larger share of failed rows is not committed.
    """

    computing = "sample"

    def __init__(self, stage: Stage, model: DiffusionModel, batch_size: BatchSize, max_error_rate: float) -> None:
        self.stage, self.ledger, self.max_error_rate = stage, stage.ledger, max_error_rate
        num_images = read_facts(Images, stage.facts.fingerprint, stage.kind.name).num_images
        self.sampler = open_sampler(stage.run.fingerprint, model, num_images, batch_size)

    def read(self, shard: int) -> pa.Table:
        return self.stage.rows(shard)

    def compute(self, shard: int, items: pa.Table, on_rows: Callable[[int], None]) -> tuple[pa.Table, Sampled]:
        sampled = self._sample(items["caption"].to_pylist(), items["image_index"].to_pylist(), on_rows)
        errors = [each for each in sampled if isinstance(each, str)]
        check_failures(errors, len(sampled), self.max_error_rate, "trajectories")
        return items, sampled

    def write(self, shard: int, found: tuple[pa.Table, Sampled], took: Took) -> Commit:
        items, sampled = found
        errors = sum(isinstance(each, str) for each in sampled)
        counts = {"ok": len(sampled) - errors, "error": errors}
        return self.ledger.commit(shard, trajectory_table(items, sampled), counts, took.seconds())

    def _sample(self, captions: list[str], noises: list[int], on_rows: Callable[[int], None]) -> Sampled:
        """Of each row its trajectory, or why there is none."""

        def compute(rows: Sequence[int]) -> list[Trajectories]:
            found = self.sampler([captions[row] for row in rows], [noises[row] for row in rows], on_batch=on_rows)
            return [found.row(at) for at in range(len(rows))]

        found = together_or_alone(range(len(captions)), compute)
        return [each if isinstance(each, str) or is_finite(each) else NOT_FINITE for each in found]


def is_finite(trajectory: Trajectories) -> bool:
    """Whether the scores of every step are numbers."""
    scores = [each for each in (trajectory.magnitude_t, trajectory.ld_t) if each is not None]
    return all(math.isfinite(float(each.sum())) for each in scores)


def trajectory_table(items: pa.Table, sampled: Sampled) -> pa.Table:
    """Rows of trajectories/.

    Args:
        items: rows of the stage. sampled: of each a single-row Trajectories, or why there is none.
    Raises:
        KeyError: a score of the first step without a column in audit/run/schema.py.
    """
    count = len(sampled)
    rows = np.array([row for row, each in enumerate(sampled) if not isinstance(each, str)], np.int64)
    good = [each for each in sampled if not isinstance(each, str)]
    images: list[bytes | None] = [None] * count
    for row, each in zip(rows.tolist(), good, strict=True):
        images[row] = None if each.images is None else encode_png(each.images[0])
    arrays: dict[str, pa.Array] = {name: items[name] for name in ("row_id", "image_index", "caption")}
    arrays["error"] = pa.array([each if isinstance(each, str) else None for each in sampled], pa.string())
    arrays["image"] = pa.array(images, pa.binary())
    scalars = [_scalars(each) for each in good]
    places = np.full(count, -1, np.int64)
    places[rows] = np.arange(len(rows))
    take = pa.array(places, mask=places < 0)
    fields = []
    for name, (kind, text) in TRAJECTORY_COLUMNS.items():
        if name in TRAJECTORY_MASKS:
            values = [mask[0] for each in good if (mask := getattr(each, name)) is not None]
            shape = values[0].shape if values else (1, 1)
            kind = pa.fixed_shape_tensor(pa.float32(), shape)
            there = rows if values else rows[:0]  # a model without attention masks has none in any row
            arrays[name] = tensor_array(np.stack(values) if values else np.zeros((0, 1, 1)), kind, there, count)
        elif name in ("magnitude_t", "ld_t"):
            steps = [getattr(each, name) for each in good]
            arrays[name] = pa.array([None if each is None else each[0] for each in steps], kind).take(take)
        elif name not in arrays:
            column = [row.get(name) for row in scalars]
            arrays[name] = pa.array(np.array(column, np.float32), kind, from_pandas=True).take(take)
        fields.append(pa.field(name, kind, metadata={"description": text}))
    schema = pa.schema(fields)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _scalars(trajectory: Trajectories) -> dict[str, float]:
    """The single numbers of one trajectory, by column of trajectories/."""
    first = {"ld_first_mask" if name == "ld" else name: values for name, values in trajectory.first.items()}
    found = {**first, **trajectory.windows(), "ld_score": trajectory.ld_score}
    unknown = set(found) - set(TRAJECTORY_COLUMNS)
    if unknown:
        raise KeyError(f"no column for {', '.join(sorted(unknown))}: add it to audit/run/schema.py")
    return {name: float(values[0]) for name, values in found.items()}


def encode_png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG as [H, W, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
