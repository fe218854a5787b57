"""Matches of one shard of captions: describe, search, compare with training pictures, commit. No threshold yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Commit
from audit.base.identity import KEYS, ROW_NUMBERS, URLS, all_named
from audit.engines.job import JobSpec, Took
from audit.index import Index
from audit.run.read import read_rows
from audit.run.run import Run
from audit.run.schema import MATCHED_COLUMNS, MEASURED_TYPE, TRAJECTORY_MASKS, table_of, tensor_values
from audit.run.stage import MATCH, TRAJECTORIES, Stage
from audit.scores.trajectories import decode_png
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.compare import Neighbour, References, match_image
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.null import threads

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

_TOGETHER = 8  # images compared at a time: their neighbours stay in memory


@dataclass(frozen=True)
class MatchFingerprint:
    """What a match depends on: the images, the index and its descriptor, how many pictures are compared, and how."""

    trajectories: str
    index: str
    descriptor: str
    neighbours: int
    rule_version: int = 1


def open_job(spec: JobSpec) -> MatchJob:
    """The matches of a run's confirm, with its index and descriptor opened.

    Raises:
        AuditError: it was not begun, the index is gone or another, or another descriptor.
    """
    run = Run.open(spec.run)
    stage = Stage.open(run, MATCH)
    config = stage.config(ConfirmConfig)
    index = Index.open_same(config.index, stage.fingerprint(MatchFingerprint).index)
    return MatchJob(stage, index, index.load_descriptor(config.sscd, spec.device), config.neighbours)


class MatchJob:
    """Matches of one shard of captions, on all cores.

    Args:
        stage: match, as it was begun.
        index: of the training pictures.
        descriptor: the index's.
        neighbours: nearest pictures an image is compared with.
    """

    computing = "match"

    def __init__(self, stage: Stage, index: Index, descriptor: Descriptor, neighbours: int) -> None:
        self.stage, self.ledger, self.run = stage, stage.ledger, stage.run
        self.trajectories = Stage.open(stage.run, TRAJECTORIES)
        self.index, self.descriptor, self.neighbours = index, descriptor, neighbours
        self.own = own_pictures(self.run, index, stage.items)
        self.pool = threads()
        self.crops = self._crops((1, 1))  # until the first image tells its size

    def _crops(self, size: tuple[int, int]) -> TrainingCrops:
        return TrainingCrops(References(self.index, size), self.descriptor, self.pool)

    def read(self, shard: int) -> pa.Table:
        """What was generated for the shard's candidates."""
        made = self.trajectories.table(shard)
        return made.filter(pc.is_null(made["error"]))

    def compute(self, shard: int, made: pa.Table, on_rows: Callable[[int], None]) -> list[dict[str, Any]]:
        items = self.stage.rows(shard)
        masks = {
            name: tensor_values(made[name]) for name in TRAJECTORY_MASKS if made.num_rows and not made[name].null_count
        }
        row_ids, numbers = made["row_id"].to_pylist(), made["image_index"].to_pylist()
        matches: dict[int, list[dict[str, Any]]] = {row_id: [] for row_id in items["row_id"].to_pylist()}
        images = dict.fromkeys(matches, 0)
        for start in range(0, made.num_rows, _TOGETHER):
            places = range(start, min(start + _TOGETHER, made.num_rows))
            pixels = [decode_png(made["image"][place].as_py()) for place in places]
            some = {name: values[start : start + _TOGETHER] for name, values in masks.items()}
            found = self._match(pixels, [row_ids[n] for n in places], [numbers[n] for n in places], some)
            for place, each in zip(places, found, strict=True):
                matches[row_ids[place]] += each
                images[row_ids[place]] += 1
            on_rows(0)
        rows = [
            {**item, "num_images": images[item["row_id"]], "matches": matches[item["row_id"]]}
            for item in items.select(["row_id", "caption"]).to_pylist()
        ]
        on_rows(len(rows))
        return rows

    def write(self, shard: int, found: list[dict[str, Any]], took: Took) -> Commit:
        unreadable = sum("unreadable" in match for row in found for match in row["matches"])
        counts = {"ok": len(found), "unreadable": unreadable}
        return self.ledger.commit(shard, matched_table(found), counts, took.seconds())

    def _match(
        self, images: Sequence[Any], row_ids: Sequence[int], numbers: Sequence[int], masks: Mapping[str, Any]
    ) -> list[list[dict[str, Any]]]:
        """Of every image its matches."""
        size = images[0].shape[:2]
        if self.crops.references.size != size:
            self.crops = self._crops(size)
        neighbours = self._neighbours(images, row_ids)
        ids = sorted({each.id for near in neighbours for each in near})
        facts = {row["id"]: row for row in self.index.facts(ids).to_pylist()} if ids else {}

        def compare(at: int) -> list[dict[str, Any]]:
            own = self.own.get(row_ids[at])
            of = {name: values[at] for name, values in masks.items()}
            return match_image(images[at], numbers[at], of, neighbours[at], own, self.crops.references, facts)

        return list(self.pool.map(compare, range(len(images))))

    def _neighbours(self, images: Sequence[Any], row_ids: Sequence[int]) -> list[list[Neighbour]]:
        """Of every image its nearest pictures, and the caption's own beyond them, with the larger of two cosines."""
        if not len(self.index):
            return [[] for _ in images]
        vectors = self.descriptor(images).numpy()
        ids, cosines = self.index.search(vectors, min(self.neighbours, len(self.index)))
        found = []
        for place, row_id in enumerate(row_ids):
            pairs = zip(ids[place].tolist(), cosines[place].tolist(), strict=True)
            near = [Neighbour(id, cosine, rank) for rank, (id, cosine) in enumerate(pairs) if id >= 0]
            own = self.own.get(row_id)
            if own is not None and own not in ids[place]:
                near.append(Neighbour(own, float(self.index.vectors([own])[0] @ vectors[place]), -1))
            found.append(near)
        self.crops.describe(each.id for near in found for each in near)
        return [
            [each._replace(sscd=self.crops.larger(vectors[place], each.id, each.sscd)) for each in near]
            for place, near in enumerate(found)
        ]


def matched_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of matched/ as a table with its documented schema."""
    columns = {name: (MEASURED_TYPE if name == "matches" else kind, t) for name, (kind, t) in MATCHED_COLUMNS.items()}
    return table_of(rows, columns)


def own_pictures(run: Run, index: Index, items: pa.Table) -> dict[int, int]:
    """row_id -> id of the picture the caption came with: by URL, by a key, by the exact caption, by a bare `id` last.

    A bare `id` is often a row number, the same in tables that have nothing to do with each other. Captions that are no
    rows of the run (negative ids) are found by the caption.
    """
    kept = run.plan.keep_cols
    urls, keys, numbers = (all_named(kept, names) for names in (URLS, KEYS, ROW_NUMBERS))
    columns = [*urls, *keys, *numbers]
    row_ids = items["row_id"].to_numpy()
    rows = read_rows(run, row_ids[row_ids >= 0], columns)
    values: dict[str, list[str | None]] = {}
    for name in columns:
        of = iter(rows[name].cast(pa.string()).to_pylist())
        values[name] = [next(of) if row_id >= 0 else None for row_id in row_ids]
    joins = [("url", values[name]) for name in urls] + [("key", values[name]) for name in keys]
    joins += [("caption", items["caption"].to_pylist())] + [("number", values[name]) for name in numbers]
    own = index.own(joins)
    return {row_id: id for row_id, id in zip(row_ids.tolist(), own, strict=True) if id is not None}
