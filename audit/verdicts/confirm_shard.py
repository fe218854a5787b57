"""Verdicts of one shard of candidates: its matches against the threshold, the best one with its picture, commit."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Commit
from audit.base.errors import AuditError
from audit.engines.job import JobSpec, Took
from audit.index import Index
from audit.run.run import Run
from audit.run.schema import BEST_TYPE, CONFIRMED_COLUMNS, MATCHES_TYPE, table_of
from audit.run.stage import CONFIRM, MATCH, TRAJECTORIES, Stage
from audit.scores.trajectories import decode_png
from audit.statistics.null import Null
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.compare import (
    References,
    best_match,
    best_verdict,
    decide,
    encode_reference,
    statistic_of,
)
from audit.verdicts.confirm import ConfirmFingerprint, read_null


def open_job(spec: JobSpec) -> ConfirmJob:
    """The verdicts of a run's confirm, with its index opened.

    Raises:
        AuditError: confirm was not begun, or the index is gone or another.
    """
    run = Run.open(spec.run)
    stage, null = Stage.open(run, CONFIRM), read_null(run)
    if null is None:
        raise AuditError(f"{run.url}: its confirm was begun anew by another command: give this one again")
    config = stage.config(ConfirmConfig)
    index = Index.open_same(config.index, stage.fingerprint(ConfirmFingerprint).index)
    return ConfirmJob(stage, index, config.match_mask, null.null())


class ConfirmJob:
    """Verdicts of one shard of candidates.

    Args:
        stage: confirm, as it was begun.
        index: of the training pictures.
        match_mask: whose mask decides.
        null: the local threshold.
    """

    computing = "decide"

    def __init__(self, stage: Stage, index: Index, match_mask: str, null: Null) -> None:
        self.stage, self.ledger, self.run = stage, stage.ledger, stage.run
        self.index, self.match_mask, self.null = index, match_mask, null
        self.matching, self.trajectories = Stage.open(stage.run, MATCH), Stage.open(stage.run, TRAJECTORIES)

    def read(self, shard: int) -> dict[int, dict[str, Any]]:
        """Of every candidate what it was matched with, by row_id."""
        return {row["row_id"]: row for row in self.matching.table(shard).to_pylist()}

    def compute(
        self, shard: int, matched: dict[int, dict[str, Any]], on_rows: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        size = self._image_size(shard)
        references = None if size is None else References(self.index, size)
        rows = []
        for item in self.stage.rows(shard).to_pylist():
            rows.append(self._row(item, matched[item["row_id"]], references))
            on_rows(1)
        return rows

    def write(self, shard: int, found: list[dict[str, Any]], took: Took) -> Commit:
        table = confirmed_table(found)
        counts = dict(collections.Counter(table["verdict"].to_pylist()))
        counts["unreadable"] = sum(match.get("unreadable") is not None for row in found for match in row["matches"])
        return self.ledger.commit(shard, table, counts, took.seconds())

    def _image_size(self, shard: int) -> tuple[int, int] | None:
        """(H, W) of the generated images; None where none was."""
        images = self.trajectories.table(shard, ["image"])["image"]
        images = images.filter(pc.is_valid(images))
        return decode_png(images[0].as_py()).shape[:2] if len(images) else None

    def _row(self, item: Mapping[str, Any], found: Mapping[str, Any], references: References | None) -> dict[str, Any]:
        matches = [decide(match, self.match_mask, self.null.threshold, self.null.untold) for match in found["matches"]]
        by_image: dict[int, list[str]] = collections.defaultdict(list)
        for match in matches:
            by_image[match["image_index"]].append(match["verdict"])
        verdicts = [best_verdict(of_image) for of_image in by_image.values()]
        verdicts += ["no_reference"] * (found["num_images"] - len(verdicts))
        verdict, best = best_verdict(verdicts), best_match(matches)
        if best is not None and references is not None:
            best = {**best, "reference_image": encode_reference(references.pixels(best["reference_id"]))}
        return {
            "row_id": item["row_id"],
            "caption": item["caption"],
            "candidate_score": item["score"],
            "candidate_rank": item["rank"],
            "verdict": verdict,
            "verdict_images": verdicts.count(verdict),
            "num_images": found["num_images"],
            "p_value": self.null.p_value(statistic_of(found["matches"], self.match_mask)),
            "best": best,
            "matches": matches,
        }


def confirmed_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of confirmed/ as a table with its documented schema."""
    kinds = {"best": BEST_TYPE, "matches": MATCHES_TYPE}
    return table_of(rows, {name: (kinds.get(name, kind), text) for name, (kind, text) in CONFIRMED_COLUMNS.items()})
