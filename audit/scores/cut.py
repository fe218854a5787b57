"""Which rows a command takes: by which score, and above what, from --by, --threshold and --thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from audit.base.errors import AuditError
from audit.run.run import Run
from audit.scores.calibrate import load_thresholds
from audit.scores.second_look import default_score


@dataclass(frozen=True)
class Cut:
    """Rows whose score `by` is above a threshold; all of them, best first, without one.

    Attributes:
        num_noises: noises that the scores must be means over for the threshold to hold; None where all rows' are.
    """

    by: str
    threshold: float | None
    num_noises: int | None


def find_cut(
    run: Run, by: str | None, threshold: float | None, thresholds: str | None, picked_by: str | None = None
) -> Cut:
    """What the flags say; where they name no score, that of the file, the one picked by before, or the run's default.

    Args:
        by, threshold, thresholds: the flags of these names; None where they were not given.
        picked_by: the score that confirm picked its candidates by.

    Raises:
        AuditError: both a threshold and a file of them, or a file that does not hold for the run or the score.
    """
    if thresholds is None:
        return Cut(by or picked_by or default_score(run), threshold, None)
    if threshold is not None:
        raise AuditError("--threshold and --thresholds: give one of them")
    file = load_thresholds(thresholds, run)
    by = by or file.facts.method
    return Cut(by, file.threshold(by), file.num_noises)
