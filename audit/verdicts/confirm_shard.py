"""Verdicts of one shard of candidates: describe, search, compare, decide, commit."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Commit, read_table
from audit.base.errors import AuditError
from audit.base.identity import KEYS, ROW_NUMBERS, URLS, all_named
from audit.engines.job import JobSpec
from audit.index import Index
from audit.run.read import read_rows
from audit.run.run import Run
from audit.run.schema import BEST_TYPE, CONFIRMED_COLUMNS, MATCHES_TYPE, TRAJECTORY_MASKS, table_of, tensor_values
from audit.run.stage import CONFIRM, TRAJECTORIES, Stage
from audit.scores.trajectories import decode_png
from audit.statistics.null import Null
from audit.verdicts.compare import References, best_match, best_verdict, encode_reference, match_image
from audit.verdicts.confirm import ConfirmConfig, read_null

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor


def open_job(spec: JobSpec) -> ConfirmJob:
    """The verdicts of a run's confirm, with its index and descriptor opened.

    Raises:
        AuditError: confirm was not begun, the index is gone, or another descriptor.
    """
    run = Run.open(spec.run)
    stage, null = Stage.open(run, CONFIRM), read_null(run)
    if null is None:
        raise AuditError(f"{run.url}: its confirm was begun anew by another command: give this one again")
    config = stage.config(ConfirmConfig)
    index = Index.open(config.index)
    return ConfirmJob(stage, index, index.load_descriptor(config.sscd, spec.device), config, null.null())


class ConfirmJob:
    """Verdicts of one shard of candidates: describe, search, compare, decide, commit.

    Args:
        stage: confirm, as it was begun. index, descriptor: of the training pictures.
        config: flags confirm was begun with. null: the local threshold.
    """

    def __init__(self, stage: Stage, index: Index, descriptor: Descriptor, config: ConfirmConfig, null: Null) -> None:
        self.stage, self.ledger, self.run = stage, stage.ledger, stage.run
        self.trajectories = Stage.open(stage.run, TRAJECTORIES)
        self.index, self.descriptor, self.config, self.null = index, descriptor, config, null
        self.own = own_pictures(self.run, index, stage.items)
        self.references = References(index, (1, 1))  # until the first image tells its size

    def __call__(self, shard: int, on_rows: Callable[[int], None]) -> Commit:
        started = time.monotonic()
        items = self.stage.rows(shard)
        made = read_table(self.run.folder, self.trajectories.file(shard))
        made = made.filter(pc.is_null(made["error"]))
        images = [decode_png(data) for data in made["image"].to_pylist()]
        if images and self.references.size != images[0].shape[:2]:
            self.references = References(self.index, images[0].shape[:2])
        masks = {name: tensor_values(made[name]) if images else np.zeros(0) for name in TRAJECTORY_MASKS}
        neighbours = self._neighbours(images, made["row_id"].to_pylist())
        described = time.monotonic()
        of_row: dict[int, list[int]] = collections.defaultdict(list)
        for place, row_id in enumerate(made["row_id"].to_pylist()):
            of_row[row_id].append(place)
        facts = self._facts(neighbours)
        rows = []
        for item in items.to_pylist():
            matches: list[dict[str, Any]] = []
            verdicts = []
            for place in of_row[item["row_id"]]:
                found = match_image(
                    images[place],
                    made["image_index"][place].as_py(),
                    {name: values[place] for name, values in masks.items()},
                    self.config.match_mask,
                    neighbours[place],
                    self.own.get(item["row_id"]),
                    self.references,
                    facts,
                    self.null,
                )
                best = best_match(found)
                verdicts.append(best["verdict"] if best else "no_reference")
                matches += found
            rows.append(self._row(item, matches, verdicts))
            on_rows(1)
        table = confirmed_table(rows)
        counts = dict(collections.Counter(table["verdict"].to_pylist()))
        counts["unreadable"] = sum(match.get("distance") is None for row in rows for match in row["matches"])
        seconds = {"describe": described - started, "wall": time.monotonic() - started}
        return self.ledger.commit(shard, table, counts, seconds)

    def _neighbours(self, images: list[Any], row_ids: list[int]) -> list[list[tuple[int, float, int]]]:
        """Of every image (id, exact cosine, rank) of its nearest pictures, and of the caption's own beyond them."""
        if not images or not len(self.index):
            return [[] for _ in images]
        vectors = self.descriptor(images).numpy()
        ids, cosines = self.index.search(vectors, min(self.config.neighbours, len(self.index)))
        found = []
        for place, row_id in enumerate(row_ids):
            pairs = zip(ids[place].tolist(), cosines[place].tolist(), strict=True)
            near = [(id, cosine, rank) for rank, (id, cosine) in enumerate(pairs) if id >= 0]
            own = self.own.get(row_id)
            if own is not None and own not in ids[place]:
                near.append((own, float(self.index.vectors([own])[0] @ vectors[place]), -1))
            found.append(near)
        return found

    def _facts(self, neighbours: list[list[tuple[int, float, int]]]) -> dict[int, dict[str, Any]]:
        ids = sorted({id for near in neighbours for id, _, _ in near})
        return {row["id"]: row for row in self.index.facts(ids).to_pylist()} if ids else {}

    def _row(self, item: dict[str, Any], matches: list[dict[str, Any]], verdicts: list[str]) -> dict[str, Any]:
        best = best_match(matches)
        verdict = best_verdict(verdicts)
        if best is not None:
            best = {**best, "reference_image": encode_reference(self.references.pixels(best["reference_id"]))}
        return {
            "row_id": item["row_id"],
            "caption": item["caption"],
            "candidate_score": item["score"],
            "candidate_rank": item["rank"],
            "verdict": verdict,
            "verdict_images": verdicts.count(verdict),
            "num_images": len(verdicts),
            "best": best,
            "matches": matches,
        }


def confirmed_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of confirmed/ as a table with its documented schema."""
    kinds = {"best": BEST_TYPE, "matches": MATCHES_TYPE}
    return table_of(rows, {name: (kinds.get(name, kind), text) for name, (kind, text) in CONFIRMED_COLUMNS.items()})


def own_pictures(run: Run, index: Index, items: pa.Table) -> dict[int, int]:
    """row_id -> id of the picture the caption came with: by URL, by a key, by the exact caption, by a bare `id` last.

    A bare `id` is often a row number, the same in tables that have nothing to do with each other.
    """
    kept = run.plan.keep_cols
    urls, keys, numbers = (all_named(kept, names) for names in (URLS, KEYS, ROW_NUMBERS))
    rows = read_rows(run, items["row_id"].to_numpy(), [*urls, *keys, *numbers])
    joins = [("url", rows[name]) for name in urls] + [("key", rows[name]) for name in keys]
    joins += [("caption", items["caption"])] + [("key", rows[name]) for name in numbers]
    own = index.own([(column, values.cast(pa.string()).to_pylist()) for column, values in joins])
    return {row_id: id for row_id, id in zip(items["row_id"].to_pylist(), own, strict=True) if id is not None}
