"""Thresholds from captions known to be clean, and what they are worth.

``score > threshold`` flags; a NaN score is never flagged but counts as a row, as in `audit.statistics.metrics`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from audit.base.errors import AuditError
from audit.statistics.intervals import share_interval

ENOUGH_ROWS = 10  # clean rows above a threshold below which more rows are advised


class CleanThreshold(NamedTuple):
    """A threshold from clean rows, and what it rests on."""

    threshold: float  # flag when score > threshold
    low: float  # interval of the true (1 - fpr) quantile of clean scores; -inf or inf where the rows cannot bound it
    high: float
    num_rows: int  # clean rows, NaN scores included
    num_above: int  # clean rows the threshold flags


def threshold_at_fpr(clean_scores: npt.ArrayLike, fpr: float, level: float = 0.95) -> CleanThreshold:
    """The lowest threshold that flags at most a share `fpr` of the clean rows, with a distribution-free interval.

    With k = floor(n * fpr) it is the (n - k)-th smallest score: ties are never split, so fewer than k rows may be
    flagged. The interval is a pair of order statistics x_(l), x_(u) with P(l <= B < u) >= level for
    B ~ Binomial(n, 1 - fpr), the number of scores up to the true quantile (David and Nagaraja 2003, 7.1). It assumes
    only that rows are independent.

    Args:
        clean_scores: [n], of captions known to be clean; NaN is never flagged and ranks lowest.
        fpr: the false positive rate wanted, in (0, 1).
    Raises:
        AuditError: fpr out of range, no rows, or no score that is a number.

    >>> threshold_at_fpr(range(1, 101), 0.05)[0]
    95.0
    """
    from scipy.special import bdtr  # type: ignore[import-untyped]

    values = np.asarray(clean_scores, dtype=np.float64)
    if not 0 < fpr < 1:
        raise AuditError(f"a false positive rate lies between 0 and 1, not {fpr:g}: pass for instance --fpr 0.01")
    if not len(values) or np.isnan(values).all():
        raise AuditError(f"none of {len(values)} clean rows has a score: no threshold can be had from them")
    num_rows = len(values)
    # [0] stands below and [n + 1] above every score, so that ranks count from 1.
    ranked = np.concatenate([[-np.inf], np.sort(np.where(np.isnan(values), -np.inf, values)), [np.inf]])
    threshold = float(ranked[num_rows - _rows_allowed(num_rows, fpr)])
    tail = (1 - level) / 2
    # at_most[i] = P(B <= i - 1), i = 0..n + 1: l is the largest i with it <= tail, u the smallest with >= 1 - tail.
    at_most = np.concatenate([[0.0], bdtr(np.arange(num_rows), num_rows, 1 - fpr), [1.0]])
    low = ranked[np.searchsorted(at_most, tail, side="right") - 1]
    high = ranked[np.searchsorted(at_most, 1 - tail, side="left")]
    return CleanThreshold(threshold, float(low), float(high), num_rows, int((values > threshold).sum()))


def _rows_allowed(num_rows: int, fpr: float) -> int:
    """The largest k with k / num_rows <= fpr, by division as in `tpr_at_fpr` (floor(0.29 * 100) would be 28)."""
    nearest = round(num_rows * fpr)
    return nearest if nearest / num_rows <= fpr else nearest - 1


def sample_size_note(num_rows: int, fpr: float) -> str:
    """What a threshold at `fpr` from that many clean rows is worth, in one line for people.

    The range is the `share_interval` of the rows it flags.

    >>> sample_size_note(500, 0.01)
    '1 % of 500 clean rows is 5: the true rate may be 0.33 % to 2.3 %; 1,000 clean rows would tell more'
    """
    allowed = _rows_allowed(num_rows, fpr)
    low, high = (f"{100 * share:.2g} %" for share in share_interval(allowed, num_rows))
    head = f"{100 * fpr:g} % of {num_rows:,} clean rows is"
    advice = f"; {math.ceil(ENOUGH_ROWS / fpr):,} clean rows would tell more"
    if not allowed:
        return (
            f"{head} less than one: the threshold is the highest clean score, the true rate may be up to {high}{advice}"
        )
    return f"{head} {allowed:,}: the true rate may be {low} to {high}{advice if allowed < ENOUGH_ROWS else ''}"
