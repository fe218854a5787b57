"""Mitigate one shard of proven copies: trigger, optimise, generate from the same noises, audit again, commit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.commits import Commit, read_table
from audit.confirm import open_index
from audit.engines import ShardFailed, allowed_failures
from audit.errors import AuditError, Drained
from audit.matching import MATCH_MASKS, Null, References, match_image
from audit.mitigate import MITIGATED_COLUMNS, MitigateConfig, open_clip, trigger_column
from audit.options import config_of
from audit.run import Run, Stage
from audit.schema import TRAJECTORY_MASKS, tensor_values
from audit.trajectories import decode_png, encode_png, open_sampler

if TYPE_CHECKING:
    from pipelines import Mitigation, Mitigator, Trajectories, TrajectorySampler
    from pipelines.loading import DiffusionModel, Embeddings

MASK_LOSS = {"final": "ld_first", "first": "ld_first_mask", "energy": "ld_energy"}
"""Column of trajectories/ that holds ld at the first step, by mask."""
MATCHED = ("sscd", "ls_norm", "ls_energy", "distance", "verdict")  # of a match, recorded before and after


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
    joined: dict[str, Any] = {name: np.concatenate(values) for name, values in columns.items()}
    return moved, Trajectories(**joined)


class MitigateJob:
    """Called with a shard of the stage `mitigate`; its settings are those the stage was begun with.

    Args:
        run: the run. model: loaded. batch_size: images at a time.
        max_error_rate: a shard with a larger share of failed images is not committed.
    """

    def __init__(self, run: Run, model: DiffusionModel, batch_size: int, max_error_rate: float) -> None:
        from pipelines import MaskSource, Mitigator

        self.run, self.stage = run, _stage(run, "mitigate")
        self.trajectories, self.confirmed = _stage(run, "trajectories"), _stage(run, "confirm")
        self.ledger, self.max_error_rate = self.stage.ledger, max_error_rate
        self.config = config = config_of(MitigateConfig, self.stage.facts["config"])
        assert config.index is not None and config.target is not None
        self.index = open_index(config.index)
        self.descriptor = self.index.load_descriptor(config.sscd, str(model.device))
        self.clip = open_clip(config.clip, str(model.device))
        self.references = References(self.index, (1, 1))  # until the first image tells its size
        self.local_threshold = Null.from_facts(json.loads(run.folder.read("stages/null.json"))).threshold
        made = run.fingerprint
        num_images = int(self.trajectories.facts["fingerprint"]["num_images"])
        self.sampler = open_sampler(made, model, num_images, 2 * batch_size)
        self.mitigator = Mitigator(
            model,
            config.loss,  # type: ignore[arg-type]
            config.target,
            mask_source=MaskSource("final", made["mask_token"], tuple(made["mask_layers"])),
            learning_rate=config.learning_rate,
            iterations=config.iterations,
            steps=made["steps"],
            guidance_scale=made["guidance_scale"],
            gradient_checkpointing=config.gradient_checkpointing,
            batch_size=batch_size,
        )
        loss = "magnitude" if config.loss == "magnitude" else MASK_LOSS[config.mask]
        trigger = trigger_column(config.loss, config.mask)
        self.trigger = MASK_LOSS[made["mask"]] if trigger == "ld" else trigger
        self.scores = {"loss": loss, "magnitude": "magnitude", "ld": "ld_first"}  # column here: of trajectories/

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit:
        started = time.monotonic()
        rows = self._read(shard)
        triggered = [row for row in rows if row["triggered"]]
        on_rows(len(rows) - len(triggered))
        for row, found in zip(triggered, self._mitigate(triggered, on_rows), strict=True):
            row |= found
        sampled = time.monotonic()
        self._audit([row for row in rows if row["error"] is None])
        failed = [row["error"] for row in rows if row["error"] is not None]
        if len(failed) > allowed_failures(self.max_error_rate, len(rows)):
            raise ShardFailed(f"{len(failed)} of {len(rows)} images failed, the first: {failed[0]}")
        untriggered = sum(row["triggered"] is False for row in rows)
        counts = {"ok": len(rows) - len(failed), "error": len(failed), "untriggered": untriggered}
        seconds = {"mitigate": sampled - started, "wall": time.monotonic() - started}
        return self.ledger.commit(shard, self.stage.file(shard), mitigated_table(rows), counts, seconds)

    def _read(self, shard: int) -> list[dict[str, Any]]:
        """The shard's rows, unmitigated: columns of mitigated/ and, for the work here, `masks` and `best`."""
        verdicts = read_table(self.run.folder, self.confirmed.file(shard), ["row_id", "best"]).to_pylist()
        best = {row["row_id"]: row["best"] for row in verdicts}
        table = read_table(self.run.folder, self.trajectories.file(shard))
        whole = table.filter(pc.is_null(table["error"]))
        masks: dict[str, Any] = {
            name: tensor_values(whole[name]) if whole.num_rows else [] for name in TRAJECTORY_MASKS
        }
        known = {}
        for at, of in enumerate(whole.drop_columns(list(TRAJECTORY_MASKS)).to_pylist()):
            found = {name: values[at] for name, values in masks.items()}
            known[of["row_id"], of["image_index"]] = {**of, "masks": found}
        settings = {"loss": self.config.loss, "target": self.config.target}
        rows = []
        for row in self.stage.rows(shard).to_pylist():
            of = known.get((row["row_id"], row["image_index"]))
            row |= {**settings, "error": None if of else "confirm's trajectory failed", "triggered": None}
            if of:
                threshold = self.config.threshold
                row |= {f"{name}_before": of[column] for name, column in self.scores.items()}
                row |= {f"{name}_after": of[column] for name, column in self.scores.items()}
                row |= {"triggered": threshold is None or of[self.trigger] > threshold, "iterations": 0}
                row |= {"image_before": of["image"], "image_after": of["image"]}
                row |= {"masks": of["masks"], "best": best[row["row_id"]]}
            rows.append(row)
        return rows

    def _mitigate(self, rows: list[dict[str, Any]], on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        """What the mitigation changes of each row: all together, or, when that fails, one by one."""
        if not rows:
            return []
        try:
            return self._mitigate_batch(rows, on_rows)
        except (AuditError, Drained):
            raise
        except Exception:  # which row it was shows below
            found = []
            for row in rows:
                try:
                    found += self._mitigate_batch([row], on_rows)
                except (AuditError, Drained):
                    raise
                except Exception as error:
                    found.append({"error": f"{type(error).__name__}: {error}"[:500]})
            return found

    def _mitigate_batch(self, rows: list[dict[str, Any]], on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        name = MATCH_MASKS[self.config.mask]
        masks = None if self.config.loss == "magnitude" else np.stack([row["masks"][name] for row in rows])
        captions, noises = [row["caption"] for row in rows], [row["image_index"] for row in rows]
        moved, made = move_and_sample(self.mitigator, self.sampler, captions, noises, masks, on_rows)
        windows, found = made.windows(), []
        assert made.images is not None
        for at, image in enumerate(made.images):
            loss, magnitude, ld = moved.last_loss[at], windows["magnitude"][at], windows["ld_first"][at]
            if not math.isfinite(loss + made.magnitude_t[at].sum() + ld):
                found.append({"error": "scores are not finite"})
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
        if self.references.size != images["before"][0].shape[:2]:
            self.references = References(self.index, images["before"][0].shape[:2])
        pictures = self.index.vectors([row["best"]["reference_id"] for row in rows])
        for when, made in images.items():
            cosines = (self.descriptor(made).numpy() * pictures).sum(1)
            aligned = None if self.clip is None else self.clip(made, [row["caption"] for row in rows])
            for at, (row, image) in enumerate(zip(rows, made, strict=True)):
                match = self._match(row, image, float(cosines[at]))
                row |= {f"{name}_{when}": match.get(name) for name in MATCHED}
                row[f"alignment_{when}"] = None if aligned is None else aligned[at]
        for row in rows:
            row |= {name: row["best"][name] for name in ("reference_id", "reference_key")}

    def _match(self, row: dict[str, Any], image: np.ndarray, sscd: float) -> dict[str, Any]:
        best, mask = row["best"], self.confirmed.facts["config"]["match_mask"]
        id = best["reference_id"]
        facts = {id: {name: best[f"reference_{name}"] for name in ("key", "url", "caption")}}
        near = [(id, sscd, 0)]
        threshold, references = self.local_threshold, self.references
        return match_image(
            image, row["image_index"], row["masks"], mask, near, None, references, facts, threshold, None
        )[0]


def mitigated_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of mitigated/ as a table with its documented schema; what a row lacks is null."""
    fields = [pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in MITIGATED_COLUMNS.items()]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def _stage(run: Run, name: str) -> Stage:
    found = Stage.find(run, name)
    if found is None:
        raise AuditError(f"{run.url}: stage {name} was not begun")
    return found
