"""Verdicts of one shard of candidates: describe, search, compare, decide, commit."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.commits import Commit, read_table
from audit.index import Index
from audit.matching import VERDICTS, Null, References, best_match, encode_reference, match_image
from audit.run import Run, Stage
from audit.schema import BEST_TYPE, CONFIRMED_COLUMNS, MATCHES_TYPE, TRAJECTORY_MASKS, tensor_values
from audit.tables import read_rows
from audit.trajectories import decode_png

if TYPE_CHECKING:
    from audit.confirm import ConfirmConfig


class ConfirmJob:
    """Verdicts of one shard of candidates: describe, search, compare, decide, commit."""

    def __init__(
        self,
        run: Run,
        trajectories: Stage,
        stage: Stage,
        index: Index,
        descriptor: Any,
        config: ConfirmConfig,
        null: Null,
    ) -> None:
        self.run, self.trajectories, self.stage, self.ledger = run, trajectories, stage, stage.ledger
        self.index, self.descriptor, self.config, self.null = index, descriptor, config, null
        self.own = own_pictures(run, index, stage.items)
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
                    self.null.threshold,
                    self.null if len(self.null.distances) else None,
                )
                best = best_match(found)
                verdicts.append(best["verdict"] if best else "no_reference")
                matches += found
            rows.append(self._row(item, matches, verdicts))
            on_rows(1)
        table = confirmed_table(rows)
        counts = dict(collections.Counter(table["verdict"].to_pylist()))
        seconds = {"describe": described - started, "wall": time.monotonic() - started}
        return self.ledger.commit(shard, self.stage.file(shard), table, counts, seconds)

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
        verdict = min(verdicts, key=VERDICTS.index) if verdicts else "no_reference"
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
    fields = [
        pa.field(name, kinds.get(name, kind), metadata={"description": text})
        for name, (kind, text) in CONFIRMED_COLUMNS.items()
    ]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def own_pictures(run: Run, index: Index, items: pa.Table) -> dict[int, int]:
    """row_id -> id of the picture the caption came with: by URL, else key, else the exact caption."""
    kept = run.plan.keep_cols
    url = next((name for name in kept if name.lower() in ("url", "image_url", "img_url")), None)
    key = next((name for name in kept if name.lower() in ("key", "image_key", "id")), None)
    ids = items["row_id"].to_pylist()
    columns = ["row_id", *(name for name in (url, key) if name)]
    rows = read_rows(run, items["row_id"].to_numpy(), columns)
    text = lambda name: None if name is None else [None if v is None else str(v) for v in rows[name].to_pylist()]  # noqa: E731
    own = index.own(items["caption"].to_pylist(), text(url), text(key))
    return {row_id: id for row_id, id in zip(ids, own, strict=True) if id is not None}
