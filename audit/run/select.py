"""The captions a run suspects most: chosen by one rule for refine, confirm, calibrate and the report."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.run.read import read_distinct, read_rows
from audit.run.run import Run
from audit.run.schema import SCORES


def check_score(by: str) -> str:
    """The column's name. Raises AuditError where no score has it."""
    if by not in SCORES:
        raise AuditError(f"--by {by}: no score column; there are {', '.join(SCORES)}")
    return by


def ranked(rows: pa.Table, by: str) -> pa.Table:
    """Distinct rows, best first: row_id and the score; ties by row, those without a score last."""
    return rows.select(["row_id", by]).sort_by([(by, "descending"), ("row_id", "ascending")])


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
) -> pa.Table:
    """The best-scored distinct captions of a run, best first: row_id and the column `by`.

    Args:
        run: the run.
        by: score column, higher is more suspicious.
        top_k: this many at most. fraction: this part of the scored captions at most. threshold: scored above this.
            Every one given must hold.
        num_noises: only rows whose scores are means over so many noises: a threshold holds for no others.
        first_look: by the scores of the first look, whatever a second one found.

    Raises:
        AuditError: a column the run does not have values in.
    """
    scores = read_distinct(run, ["row_id", check_score(by), "num_noises"], first_look=first_look)
    if num_noises is not None:
        scores = scores.filter(pc.equal(scores["num_noises"], num_noises))
    table = ranked(scores, by)
    count = len(table) - table[by].null_count
    if not count and num_noises is None:
        raise AuditError(f"--by {by}: the run has no scores in this column")
    if fraction is not None:
        count = min(count, rows_of(fraction, count))
    if top_k is not None:
        count = min(count, top_k)
    if threshold is not None:
        count = min(count, pc.sum(pc.greater(table[by], threshold)).as_py() or 0)
    return table.slice(0, count)


def best_rows(
    run: Run,
    by: str,
    top_k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    num_noises: int | None = None,
) -> pa.Table:
    """The same with their captions: row_id, caption, score, rank. Raises AuditError as `best_scores`."""
    table = best_scores(run, by, top_k, fraction, threshold, num_noises)
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
    scores = read_distinct(run, ["row_id", check_score(by), "num_noises"])
    looked = pc.equal(scores["num_noises"], num_noises)
    values = scores[by].filter(looked).drop_null()
    return scores.num_rows - len(values) if len(values) and pc.all(pc.greater(values, threshold)).as_py() else 0


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
