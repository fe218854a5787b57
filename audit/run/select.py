"""The captions a run suspects most: chosen by one rule for refine, confirm, calibrate and the report."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.captions import SAMPLE
from audit.run.read import PART_ROWS, distinct_parts, read_rows
from audit.run.run import Run
from audit.run.schema import SCORES, STEADY_SCORE

LARGE_RUN_SCORE = "excess"
"""What finds most where a run has captions enough to say what is usual of them (docs/detection.md)."""
SCORE_OF_SIZE_HELP = f"{LARGE_RUN_SCORE}, or {STEADY_SCORE} in a run of fewer than {SAMPLE} captions"


def score_of_size(run: Run) -> str:
    """The score a run's second look is chosen by where none is named: by how many captions its null maps can be of."""
    return LARGE_RUN_SCORE if len(run.plan.sample) >= SAMPLE else STEADY_SCORE


def check_score(by: str) -> str:
    """The column's name. Raises AuditError where no score has it."""
    if by not in SCORES:
        raise AuditError(f"--by {by}: no score column; there are {', '.join(SCORES)}")
    return by


def ranked(rows: pa.Table, by: str) -> pa.Table:
    """Distinct rows, best first: row_id and the score; ties by row, those without a score last."""
    return rows.select(["row_id", by]).sort_by([(by, "descending"), ("row_id", "ascending")])


def exceeds(scores: pa.ChunkedArray, threshold: float) -> pa.ChunkedArray:
    """Which scores flag: above the threshold as scores are stored, so that 1.2 is not above 1.2."""
    return pc.greater(scores, pa.scalar(threshold, scores.type))


def rows_of(fraction: float, count: int) -> int:
    """How many a fraction of `count` is: rounded up, but for float noise (0.1 of 30 is 3)."""
    return math.ceil(round(fraction * count, 9))


def best_scores(
    run: Run,
    by: str,
    top_k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    num_noises: int | None = None,
    first_look: bool = False,
    confirmed: bool = True,
) -> pa.Table:
    """The best-scored distinct captions of a run, best first: row_id and the column `by`.

    Args:
        run: the run.
        by: score column, higher is more suspicious.
        top_k: this many at most. fraction: this part of the scored captions at most. threshold: scored above this.
            Every one given must hold.
        num_noises: only rows whose scores are means over so many noises: a threshold holds for no others.
        first_look: by the scores of the first look, whatever a second one found.
        confirmed: by what confirm's trajectories tell as well.

    Raises:
        AuditError: a column the run does not have values in.
    """
    columns, scored, limit = ["row_id", check_score(by), "num_noises"], 0, top_k

    def parts() -> Iterator[pa.Table]:
        return distinct_parts(run, columns, first_look, confirmed)

    if fraction is not None:
        limit = rows_of(fraction, sum(len(part) - part[by].null_count for part in parts()))
        limit = limit if top_k is None else min(limit, top_k)
    best = Best(by, limit)
    for part in parts():
        part = part if num_noises is None else part.filter(pc.equal(part["num_noises"], num_noises))
        scored += len(part) - part[by].null_count
        best.add(part if threshold is None else part.filter(exceeds(part[by], threshold)))
    if not scored and num_noises is None:
        raise AuditError(f"--by {by}: the run has no scores in this column")
    return best.table()


class Best:
    """The best-scored rows of tables that come one after the other; holds those wanted and as many more, or a part.

    Args:
        by: score column. limit: rows wanted; None for all that have a score.
    """

    def __init__(self, by: str, limit: int | None) -> None:
        self.by, self.limit = by, limit
        self._held, self._count = list[pa.Table](), 0
        self._least: pa.Scalar | None = None  # what a row must score at least to be among them

    def add(self, rows: pa.Table) -> None:
        """More rows: `row_id` and the score."""
        able = pc.is_valid(rows[self.by]) if self._least is None else pc.greater_equal(rows[self.by], self._least)
        rows = rows.select(["row_id", self.by]).filter(able)
        self._held.append(rows)
        self._count += rows.num_rows
        if self.limit is not None and self._count > self.limit + max(self.limit, PART_ROWS):
            table = self.table()
            self._held, self._count = [table], table.num_rows
            self._least = table[self.by][-1] if table.num_rows else None

    def table(self) -> pa.Table:
        """Those wanted, best first; ties by row."""
        found = ranked(pa.concat_tables(self._held), self.by)
        return found if self.limit is None else found.slice(0, self.limit).combine_chunks()


def best_rows(
    run: Run,
    by: str,
    top_k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    num_noises: int | None = None,
    confirmed: bool = True,
) -> pa.Table:
    """The same with their captions: row_id, caption, score, rank. Raises AuditError as `best_scores`."""
    table = best_scores(run, by, top_k, fraction, threshold, num_noises, confirmed=confirmed)
    return pa.table(
        {
            "row_id": table["row_id"],
            "caption": read_rows(run, table["row_id"].to_numpy(), ["caption"])["caption"],
            "score": table[by].cast(pa.float32()),
            "rank": pa.array(np.arange(table.num_rows), pa.int32()),
        }
    )


def unlooked(run: Run, by: str, threshold: float, num_noises: int | None) -> int:
    """How many captions a threshold passes over that it might flag: those without a second look, where all with one are
    above it; else 0. The more of them are copied, the larger `--second-look` has to be.

    Args:
        num_noises: that the threshold's scores are means over; None where all rows' are.
    """
    if num_noises is None:
        return 0
    others = looked = 0
    for part in distinct_parts(run, ["row_id", check_score(by), "num_noises"]):
        values = part[by].filter(pc.equal(part["num_noises"], num_noises)).drop_null()
        if len(values) and not pc.all(exceeds(values, threshold)).as_py():
            return 0
        looked += len(values)
        others += part.num_rows - len(values)
    return others if looked else 0


def unlooked_line(count: int, by: str) -> str:
    """Of `unlooked`, for people."""
    return (
        f"{count:,} captions had no second look, while all that had one are above the threshold of {by}: more may "
        "be: scan into a new folder with a larger --second-look."
    )


def with_images(rows: pa.Table, num_images: int) -> pa.Table:
    """Every row once an image: `image_index` 0 to num_images - 1."""
    repeated = rows.take(pa.array(np.repeat(np.arange(rows.num_rows), num_images)))
    return repeated.append_column("image_index", pa.array(np.tile(np.arange(num_images), rows.num_rows), pa.int32()))
