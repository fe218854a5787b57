"""Every score a run holds of some captions, as one value a caption."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.schema import DETECTORS, F32, SCORES, TRAJECTORY_COLUMNS, WINDOWS

BASELINE = "magnitude"  # what every score is compared with, pairwise
NOT_CONFIRMED = "not a candidate"
UNDECIDED = "no verdict yet"  # of a candidate
_OF_DETECTORS = tuple(name for name in DETECTORS if name not in (BASELINE, "ld_energy"))
TRAJECTORY_SCORES = tuple(
    name for name, (kind, _) in TRAJECTORY_COLUMNS.items() if kind == F32 and name not in _OF_DETECTORS
)
"""Scores of a trajectory; the other detectors' are those of the scan."""
MATCH_SCORES = ("sscd", "s", "ls", "ls_norm", "ls_energy", "ls_score", "ls_corr")

SECOND_LOOK = "second look"
"""Instead of `one` or `mean`: the best-scored captions' values are means over more noises than the others'."""


@dataclass(frozen=True)
class Series:
    """One score of some captions: row_ids [m], values [m], NaN where the run could not give it."""

    stage: str
    score: str
    images: str
    row_ids: NDArray[np.int64]
    values: NDArray[np.float64]


def find_series(run: Run, row_ids: NDArray[np.int64]) -> Iterator[Series]:
    """Every score the run holds of these captions: the scan's, then those of the candidates."""
    table = read_scores(run, ["row_id", "num_noises", *SCORES])
    noises = pc.unique(table["num_noises"].drop_null()).to_pylist() or [run.fingerprint.num_noises]
    images = SECOND_LOOK if len(noises) > 1 else "mean" if noises[0] > 1 else "one"
    ids = table["row_id"].to_numpy()
    kept = np.isin(ids, row_ids)
    for name in SCORES:
        values = _numbers(table[name])[kept]
        known = np.isfinite(values) if name in WINDOWS else np.ones(len(values), bool)
        if np.isfinite(values).any():
            yield Series("scan", name, images, ids[kept][known], values[known])
    found = read_stage(run, "trajectories")
    if found is not None:
        kept = np.isin(found["row_id"].to_numpy(), row_ids)
        yield from _per_image("trajectories", found.filter(pa.array(kept)), TRAJECTORY_SCORES, ("one", "mean"))
    found = read_stage(run, "confirm", ["row_id", "num_images", "matches"])
    if found is not None:
        kept = np.isin(found["row_id"].to_numpy(), row_ids)
        best = _best_matches(found.filter(pa.array(kept)))
        yield from _per_image("confirm", best, MATCH_SCORES, ("one", "mean", "best"))


def _per_image(stage: str, table: pa.Table, names: Sequence[str], ways: Sequence[str]) -> Iterator[Series]:
    """Scores with a row an image, as one value a caption: of image 0, the mean of K, the best of K."""
    frame = table.select(["row_id", "image_index", *names]).to_pandas()
    several = len(frame) > frame["row_id"].nunique()
    for way in ways if several else ("one",):
        rows = frame[frame["image_index"] == 0] if way == "one" else frame
        grouped = rows.drop(columns="image_index").groupby("row_id")
        values = grouped.max() if way == "best" else grouped.mean()
        for name in names:
            if values[name].notna().any():
                yield Series(stage, name, way, values.index.to_numpy(np.int64), values[name].to_numpy(np.float64))


def _best_matches(confirmed: pa.Table) -> pa.Table:
    """The best value of every match score by image, a row an image; null where nothing could be compared."""
    rows: list[dict[str, Any]] = []
    for row in confirmed.to_pylist():
        every = row["matches"] or []
        # an image that failed has no matches, and its number stays free
        for image in sorted({match["image_index"] for match in every}) or range(row["num_images"]):
            matches = [match for match in every if match["image_index"] == image]
            known = {name: [m[name] for m in matches if m.get(name) is not None] for name in MATCH_SCORES}
            best = {name: max(values, default=None) for name, values in known.items()}
            rows.append({"row_id": row["row_id"], "image_index": image, **best})
    kinds = [("row_id", pa.int64()), ("image_index", pa.int32()), *((name, pa.float64()) for name in MATCH_SCORES)]
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)  # nulls become NaN


def covered(series: Series, row_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.isin(row_ids, series.row_ids)


def aligned(series: Series, row_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The series' value of each of these captions, NaN where it has none."""
    values = dict(zip(series.row_ids.tolist(), series.values.tolist(), strict=True))
    return np.array([values.get(row, math.nan) for row in row_ids.tolist()], np.float64)
