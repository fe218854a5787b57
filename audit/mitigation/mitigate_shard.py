"""Mitigate one shard of proven copies: trigger, optimise, generate from the same noises, audit again, commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Commit
from audit.base.errors import AuditError
from audit.engines.failures import check_failures, together_or_alone
from audit.engines.job import JobSpec, Took
from audit.index import Index
from audit.mitigation.config import MASK_LOSS, open_clip, trigger_column
from audit.mitigation.mitigate import MitigateConfig, MitigateFingerprint
from audit.run.run import Run
from audit.run.schema import MASKS, MITIGATED_COLUMNS, TRAJECTORY_MASKS, table_of, tensor_values
from audit.run.select import exceeds
from audit.run.stage import CONFIRM, MITIGATE, TRAJECTORIES, Stage
from audit.scores.model import load_run_model
from audit.scores.trajectories import NOT_FINITE, decode_png, encode_png, is_finite, open_sampler
from audit.verdicts.candidates import ConfirmConfig, TrajectoriesFingerprint
from audit.verdicts.compare import Neighbour, References, decide, match_image
from audit.verdicts.confirm import ConfirmFingerprint, read_null
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.null import threads

if TYPE_CHECKING:
    from pipelines import DiffusionModel, Mitigation, Mitigator, Trajectories, TrajectorySampler
    from pipelines.loading import Embeddings

WORKING = ("shard", "masks", "best")  # of a row, for the work here only
MATCHED = (
    "sscd",
    "ls_norm",
    "ls_energy",
    "distance",
    "correlation_distance",
    "verdict",
)  # of a match, recorded before and after


def open_job(spec: JobSpec) -> MitigateJob:
    """The mitigation of a run, with its model, index, descriptor and CLIP loaded."""
    run = Run.open(spec.run)
    assert spec.batch_size != "auto"  # no flag of mitigate
    return MitigateJob(run, load_run_model(run, spec.device, spec.compile), spec.batch_size, spec.max_error_rate)


def move_and_sample(
    mitigator: Mitigator,
    sampler: TrajectorySampler,
    prompts: list[str] | Embeddings,
    noise_indices: Sequence[int],
    masks: np.ndarray | None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> tuple[Mitigation, Trajectories]:
    """Mitigate prompts and sample them.

    Args:
        prompts: N. noise_indices: which noise of the sampler's bank each starts from, [N]. masks: of ld, [N, H, W].
        on_batch: called with 0 as embeddings are moved and with the number of images made; may raise to stop.
    """
    import torch

    from pipelines import Trajectories

    indices = torch.tensor(noise_indices)
    given = None if masks is None else torch.from_numpy(np.array(masks, np.float32))
    moved = mitigator(prompts, sampler.noises[indices], given, lambda _: on_batch(0))
    columns: dict[str, list[np.ndarray]] = {}
    batches = sampler.batches.run(
        len(indices), lambda part: sampler.sample(moved.embeddings.take(part), sampler.noises[indices[part]])
    )
    for part, found in batches:
        for name, value in found.items():
            columns.setdefault(name, []).append(value.cpu().numpy())
        on_batch(part.stop - part.start)
    return moved, Trajectories.of({name: np.concatenate(values) for name, values in columns.items()})


class MitigateJob:
    """Called with a shard of the stage `mitigate`; its settings are those the stage was begun with.

    Args:
        run: the run. model: loaded. batch_size: images at a time.
        max_error_rate: a shard with a larger share of failed images is not committed.
    """

    computing = "mitigate"

    def __init__(self, run: Run, model: DiffusionModel, batch_size: int, max_error_rate: float) -> None:
        from pipelines import MaskSource, Mitigator

        self.run, self.stage = run, Stage.open(run, MITIGATE)
        self.trajectories, self.confirmed = Stage.open(run, TRAJECTORIES), Stage.open(run, CONFIRM)
        self.ledger, self.max_error_rate = self.stage.ledger, max_error_rate
        self.config = config = self.stage.config(MitigateConfig)
        null = read_null(run)
        if config.index is None or config.mask is None or null is None:
            raise AuditError(f"{run.url}: its mitigation was begun by another command: give this one again")
        self.target = self.stage.fingerprint(MitigateFingerprint).target
        self.match_mask = self.confirmed.config(ConfirmConfig).match_mask
        self.index = Index.open_same(config.index, self.confirmed.fingerprint(ConfirmFingerprint).index)
        self.descriptor = self.index.load_descriptor(config.sscd, str(model.device))
        self.clip = open_clip(config.clip, str(model.device))
        self.pool = threads()
        self.crops = self._crops((1, 1))  # until the first image tells its size
        self.threshold = null.null().threshold
        made = run.fingerprint
        num_images = self.trajectories.fingerprint(TrajectoriesFingerprint).num_images
        self.sampler = open_sampler(made, model, num_images, 2 * batch_size)
        self.mitigator = Mitigator(
            model,
            config.loss,
            self.target,
            mask_source=MaskSource("final", made.mask_token, tuple(made.mask_layers)),
            learning_rate=config.learning_rate,
            iterations=config.iterations,
            steps=made.steps,
            guidance_scale=made.guidance_scale,
            gradient_checkpointing=config.gradient_checkpointing,
            batch_size=batch_size,
        )
        self.mask = config.mask
        loss = "magnitude" if config.loss == "magnitude" else MASK_LOSS[self.mask]
        trigger = trigger_column(config.loss, self.mask)
        self.trigger = MASK_LOSS[made.mask] if trigger == "ld" else trigger
        self.scores = {"loss": loss, "magnitude": "magnitude", "ld": "ld_first"}  # column here: of trajectories/

    def _crops(self, size: tuple[int, int]) -> TrainingCrops:
        return TrainingCrops(References(self.index, size), self.descriptor, self.pool)

    def read(self, shard: int) -> list[dict[str, Any]]:
        """The shard's rows, unmitigated: columns of mitigated/ and, for the work here, `masks` and `best`."""
        verdicts = self.confirmed.table(shard, ["row_id", "best"]).to_pylist()
        best = {row["row_id"]: row["best"] for row in verdicts}
        table = self.trajectories.table(shard)
        whole = table.filter(pc.is_null(table["error"]))
        masks = {name: tensor_values(whole[name]) for name in TRAJECTORY_MASKS if not whole[name].null_count}
        threshold, known = self.config.threshold, {}
        above = [True] * len(whole) if threshold is None else exceeds(whole[self.trigger], threshold).to_pylist()
        for at, of in enumerate(whole.drop_columns(list(TRAJECTORY_MASKS)).to_pylist()):
            found = {name: values[at] for name, values in masks.items()}
            known[of["row_id"], of["image_index"]] = {**of, "masks": found, "above": above[at]}
        settings = {"loss": self.config.loss, "target": self.target}
        rows = []
        for row in self.stage.rows(shard).to_pylist():
            of = known.get((row["row_id"], row["image_index"]))
            row |= {**settings, "error": None if of else "confirm's trajectory failed", "triggered": None}
            if of:
                row |= {f"{name}_before": of[column] for name, column in self.scores.items()}
                row |= {f"{name}_after": of[column] for name, column in self.scores.items()}
                row |= {"triggered": of["above"], "iterations": 0}
                row |= {"image_before": of["image"], "image_after": of["image"]}
                row |= {"masks": of["masks"], "best": best[row["row_id"]]}
            rows.append(row)
        return rows

    def compute(self, shard: int, rows: list[dict[str, Any]], on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        triggered = [row for row in rows if row["triggered"]]
        on_rows(len(rows) - len(triggered))
        for row, found in zip(triggered, self._mitigate(triggered, on_rows), strict=True):
            row |= found
        self._audit([row for row in rows if row["error"] is None])
        failed = [row["error"] for row in rows if row["error"] is not None]
        check_failures(failed, len(rows), self.max_error_rate, "images")
        return rows

    def write(self, shard: int, found: list[dict[str, Any]], took: Took) -> Commit:
        failed = sum(row["error"] is not None for row in found)
        untriggered = sum(row["triggered"] is False for row in found)
        counts = {"ok": len(found) - failed, "error": failed, "untriggered": untriggered}
        return self.ledger.commit(shard, mitigated_table(found), counts, took.seconds())

    def _mitigate(self, rows: list[dict[str, Any]], on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        """What the mitigation changes of each row."""
        found = together_or_alone(rows, lambda part: self._mitigate_batch(part, on_rows))
        return [{"error": each} if isinstance(each, str) else each for each in found]

    def _mitigate_batch(self, rows: Sequence[dict[str, Any]], on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        name = MASKS[self.mask]
        masks = None if self.config.loss == "magnitude" else np.stack([row["masks"][name] for row in rows])
        captions, noises = [row["caption"] for row in rows], [row["image_index"] for row in rows]
        moved, made = move_and_sample(self.mitigator, self.sampler, captions, noises, masks, on_rows)
        windows, found = made.windows(), []
        assert made.images is not None
        for at, image in enumerate(made.images):
            loss, magnitude = moved.last_loss[at], windows["magnitude"][at]
            ld = windows["ld_first"][at] if "ld_first" in windows else None
            if not (math.isfinite(loss) and is_finite(made.row(at))):
                found.append({"error": NOT_FINITE})
                continue
            scores = {"loss_after": loss, "magnitude_after": magnitude, "ld_after": ld}
            scores |= {"iterations": moved.iterations_used[at], "image_after": encode_png(image)}
            found.append(scores)
        return found

    def _audit(self, rows: list[dict[str, Any]]) -> None:
        """Compare the images before and after with the same training picture, and with the caption."""
        if not rows:
            return
        images = {when: [decode_png(row[f"image_{when}"]) for row in rows] for when in ("before", "after")}
        if self.crops.references.size != images["before"][0].shape[:2]:
            self.crops = self._crops(images["before"][0].shape[:2])
        ids = [row["best"]["reference_id"] for row in rows]
        pictures = self.index.vectors(ids)
        self.crops.describe(ids)
        for when, made in images.items():
            vectors = self.descriptor(made).numpy()
            whole = (vectors * pictures).sum(1).tolist()
            cosines = [self.crops.larger(*each) for each in zip(vectors, ids, whole, strict=True)]
            aligned = None if self.clip is None else self.clip(made, [row["caption"] for row in rows])
            for at, (row, image) in enumerate(zip(rows, made, strict=True)):
                match = self._match(row, image, cosines[at])
                row |= {f"{name}_{when}": match.get(name) for name in MATCHED}
                row[f"alignment_{when}"] = None if aligned is None else aligned[at]
        for row in rows:
            row |= {name: row["best"][name] for name in ("reference_id", "reference_key")}

    def _match(self, row: dict[str, Any], image: np.ndarray, sscd: float) -> dict[str, Any]:
        best = row["best"]
        id = best["reference_id"]
        facts = {id: {name: best[f"reference_{name}"] for name in ("key", "url", "caption")}}
        near = [Neighbour(id, sscd, 0)]
        matches = match_image(image, row["image_index"], row["masks"], near, None, self.crops.references, facts)
        return decide(matches[0], self.match_mask, self.threshold)


def mitigated_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of mitigated/ as a table with its documented schema; what a row lacks is null."""
    return table_of(
        [{name: value for name, value in row.items() if name not in WORKING} for row in rows], MITIGATED_COLUMNS
    )
