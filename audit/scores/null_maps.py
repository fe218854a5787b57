"""What `excess` is measured against: energy maps of a sample of the run's own captions, a stage before the scan.

The sample is the captions with the lowest hashes (audit/captions/sample.py), so that it depends on the captions alone.
One process makes the maps, under a claim, and commits them a shard a noise; every worker reads what was committed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.claims import CLAIMS, held
from audit.base.commits import Commit
from audit.base.errors import AuditError, Broken, ends_the_job
from audit.base.fingerprint import digest
from audit.base.stopping import Stop
from audit.captions import SAMPLE, read_captions
from audit.engines.failures import ShardFailed, together_or_alone
from audit.engines.job import JobSpec, Took
from audit.engines.launch import EngineConfig
from audit.run.claim import take_back
from audit.run.run import Run
from audit.run.schema import NULL_MAP_COLUMNS, tensor_array, tensor_values
from audit.run.stage import NULL_MAPS, SECOND_NULL_MAPS, Stage, StageKind, run_stage
from audit.scores.model import load_run_model

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines import DiffusionModel
    from pipelines.batching import BatchSize
    from pipelines.null_maps import NullMaps

PARTS = b"common_parts"
"""Key of a null map file's schema metadata: `formulas.common_parts` as an .npy file, float32 [17, C, H, W]."""


@dataclass(frozen=True)
class NullMapsFingerprint:
    """What null maps depend on beside the run's model and noises.

    Attributes:
        captions: digest of the sampled captions, in order. count: how many.
        first_noise, num_noises: which noises of the bank.
    """

    captions: str
    count: int
    first_noise: int
    num_noises: int


def make_null_maps(
    run: Run, kind: StageKind, noises: range, config: EngineConfig, stop: Stop | None, new: bool = False
) -> Stage | None:
    """Make the null maps of some noises, or wait for the process that makes them; None for a run without captions.

    Args:
        new: the run was begun by this very call: where its model is refused it is taken back, so that the same command
            serves the model once it is mended, or another.

    Raises:
        AuditError: the model is not what its folder says.
        Drained: `stop` asked to.
        Broken: no caption of the sample could be scored; nothing was begun that needs the maps.
    """
    if not run.plan.sample:
        return None
    run.still()  # and was not taken back by the process that began it
    stage = _begin(run, kind, noises)
    if stage.complete:
        return stage
    place, identity = f"{CLAIMS}/{kind.name}", asdict(run.fingerprint)
    with held(run.folder, place, identity, lambda: stage.complete, "makes the null maps", stop) as number:
        if number:
            run.still()  # likewise, by the one that held the claim
        try:
            outcome = run_stage(stage, stage.missing() if number else [], config, stop)
        except AuditError as error:
            if new and number and ends_the_job(error) and not stage.done():
                with contextlib.suppress(AuditError):
                    take_back(run, stop)
            raise
    if outcome.quarantined:
        why = {shard: stage.ledger.attempts(shard)[-1].error for shard in outcome.quarantined}
        for shard in why:
            stage.ledger.forget_attempts(shard)
        raise Broken(
            f"{run.url}: the null maps of excess cannot be made: {next(iter(why.values()))}: nothing was scanned; mend "
            "it, and give the same command again."
        )
    return stage


def _begin(run: Run, kind: StageKind, noises: range) -> Stage:
    found = Stage.find(run, kind)
    if found is not None and not found.problems():
        begun = found.fingerprint(NullMapsFingerprint)
        if range(begun.first_noise, begun.first_noise + begun.num_noises) == noises:
            return found
    rows = run.plan.sample
    captions = read_captions(run.plan, rows, run.folder)
    one = pa.table({"row_id": pa.array(rows, pa.int64()), "caption": pa.array(captions, pa.string())})
    items = pa.concat_tables(
        one.append_column("shard", pa.array(np.full(len(rows), noise), pa.int32())) for noise in noises
    )
    fingerprint = NullMapsFingerprint(digest({"captions": captions}), len(rows), noises.start, len(noises))
    return Stage.begin(run, kind, fingerprint, items, replace=True)


def sample_of(run: Run) -> NullMapsFingerprint | None:
    """What the run's null maps are made of; None where it has none."""
    stage = Stage.find(run, NULL_MAPS)
    return None if stage is None else stage.fingerprint(NullMapsFingerprint)


def few_lines(count: int) -> list[str]:
    """Said of a run whose null maps are of so many captions; [] where these are as many as they should be."""
    if not count or count >= SAMPLE:
        return []
    return [f"note: excess rests on few captions: the null maps are of all {count:,} there are, not of {SAMPLE:,}"]


def lost_lines(stage: Stage | None) -> list[str]:
    """Said of null maps of which captions could not be scored: under one of the noises so many."""
    lost = max((each.counts["error"] for each in stage.done().values()), default=0) if stage else 0
    if stage is None or not lost:
        return []
    count = len(stage.run.plan.sample)
    return [
        f"note: excess rests on {count - lost:,} captions: {lost:,} of the {count:,} of its null maps could not be "
        f"scored; why: column error of {stage.run.folder.path(stage.kind.files)}"
    ]


def read_null_maps(run: Run, *kinds: StageKind) -> NullMaps | None:
    """The null maps of the noises of some stages, in order; None for a run that has none.

    Raises:
        Damaged: they are not what was committed.
    """
    import torch

    from pipelines.null_maps import NullMaps, Residual

    energies, residuals, parts = [], [], []
    for stage in (Stage.find(run, kind) for kind in kinds):
        if stage is None:
            return None
        for shard in stage.shards:
            table = stage.table(shard)
            table = table.filter(pc.is_null(table["error"]))
            energies.append(_maps(table["energy"]))
            if PARTS in (table.schema.metadata or {}):
                parts.append(torch.from_numpy(np.load(io.BytesIO(table.schema.metadata[PARTS]))))
                residuals.append(_maps(table["residual"]))
    if len(parts) < len(energies):  # made before there was excess_pca
        return NullMaps.of(energies)
    return NullMaps.of(energies, Residual.of(parts, residuals))


def _maps(column: pa.ChunkedArray) -> Tensor:
    import torch

    return torch.from_numpy(tensor_values(column).copy())


def open_job(spec: JobSpec) -> NullMapsJob:
    """The null maps of a scan, with the run's model loaded."""
    return _open(spec, NULL_MAPS)


def open_second(spec: JobSpec) -> NullMapsJob:
    """Those of the noises that a second look adds."""
    return _open(spec, SECOND_NULL_MAPS)


def _open(spec: JobSpec, kind: StageKind) -> NullMapsJob:
    run = Run.open(spec.run)
    return NullMapsJob(Stage.open(run, kind), load_run_model(run, spec.device, spec.compile), spec.batch_size)


Differences = list["np.ndarray | str"]  # [C, H, W] of each caption, or why it has none


class NullMapsJob:
    """Energy maps of the sample under one noise a shard, a row a caption; one that fails is left out of the maps.

    Args:
        stage: null maps, as they were begun. model: loaded. batch_size: latents at a time.
    """

    computing = "score"

    def __init__(self, stage: Stage, model: DiffusionModel, batch_size: BatchSize) -> None:
        self.stage, self.ledger, self.model, self.batch_size = stage, stage.ledger, model, batch_size

    def read(self, shard: int) -> pa.Table:
        return self.stage.rows(shard)

    def compute(self, shard: int, items: pa.Table, on_rows: Callable[[int], None]) -> tuple[pa.Table, Differences]:
        from pipelines import FirstStepScorer

        made = self.stage.run.fingerprint
        scorer = FirstStepScorer(
            self.model,
            num_noises=shard + 1,
            first_noise=shard,
            seed=made.seed,
            steps=made.steps,
            guidance_scale=made.guidance_scale,
            batch_size=self.batch_size,
        )
        captions = items["caption"].to_pylist()

        def compute(rows: Sequence[int]) -> list[np.ndarray]:
            return list(scorer.differences([captions[row] for row in rows], on_rows)[:, 0].numpy())

        found = together_or_alone(range(len(captions)), compute)
        differences: Differences = [
            each if isinstance(each, str) or np.isfinite(each).all() else "the noise difference is not finite"
            for each in found
        ]
        errors = [each for each in differences if isinstance(each, str)]
        if len(errors) == len(captions):
            raise ShardFailed(f"none of {len(captions)} captions could be scored, the first: {errors[0]}")
        return items, differences

    def write(self, shard: int, found: tuple[pa.Table, Differences], took: Took) -> Commit:
        items, differences = found
        errors = sum(isinstance(each, str) for each in differences)
        counts = {"ok": len(differences) - errors, "error": errors}
        return self.ledger.commit(shard, _table(items, differences), counts, took.seconds())


def _table(items: pa.Table, differences: Differences) -> pa.Table:
    """Rows of null_maps/: of each caption its maps, or why there are none; what they have in common beside (PARTS)."""
    import torch

    from pipelines import formulas

    good = np.array([row for row, each in enumerate(differences) if not isinstance(each, str)], np.int64)
    found = torch.from_numpy(np.stack([each for each in differences if not isinstance(each, str)]))
    parts = formulas.common_parts(found)
    maps = {"energy": formulas.energy_map(found), "residual": formulas.energy_map(formulas.less_common(found, parts))}
    kind = pa.fixed_shape_tensor(pa.float32(), found.shape[2:])
    arrays = {
        "row_id": items["row_id"],
        "caption": items["caption"],
        "error": pa.array([each if isinstance(each, str) else None for each in differences], pa.string()),
        **{name: tensor_array(each.numpy(), kind, good, len(differences)) for name, each in maps.items()},
    }
    fields = [
        pa.field(name, kind if name in maps else plain, metadata={"description": text})
        for name, (plain, text) in NULL_MAP_COLUMNS.items()
    ]
    sink = io.BytesIO()
    np.save(sink, parts.numpy())
    schema = pa.schema(fields, metadata={PARTS: sink.getvalue()})
    return pa.table([arrays[field.name] for field in fields], schema=schema)
