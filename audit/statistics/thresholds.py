"""Thresholds from captions known to be clean, and what they are worth.

``score > threshold`` flags; a NaN score is never flagged but counts as a row, as in `audit.statistics.metrics`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from audit.base.errors import AuditError

ENOUGH_ROWS = 10  # clean rows above a threshold below which more rows are advised


def rows_needed(fpr: float) -> int:
    """Clean rows without which no threshold keeps a false-positive rate: the least n with (n + 1) fpr >= 1.

    >>> rows_needed(0.05), rows_needed(0.01)
    (19, 99)
    """
    return math.ceil(round(1 / fpr, 9)) - 1


def rows_allowed(num_rows: int, fpr: float) -> int:
    """Clean rows that a threshold may flag: floor((n + 1) fpr) - 1; -1 where there are too few rows for any.

    >>> rows_allowed(100, 0.01), rows_allowed(98, 0.01)
    (0, -1)
    """
    return math.floor(round((num_rows + 1) * fpr, 9)) - 1


class CleanThreshold(NamedTuple):
    """A threshold from clean rows, and what it rests on."""

    threshold: float  # flag when score > threshold
    low: float  # interval of the true (1 - fpr) quantile of clean scores; -inf or inf where the rows cannot bound it
    high: float
    num_rows: int  # clean rows, NaN scores included
    num_above: int  # clean rows the threshold flags


def threshold_at_fpr(clean_scores: npt.ArrayLike, fpr: float, level: float = 0.95) -> CleanThreshold:
    """The threshold that flags a new clean row with a chance of at most `fpr`, with a distribution-free interval.

    It is the ceil((n + 1)(1 - fpr))-th smallest of n scores: a new row is as likely to fall into any of the n + 1 gaps
    between them, so it lies above with a chance of floor((n + 1) fpr) / (n + 1), and with less where scores are tied
    (split conformal prediction: Vovk et al. 2005; Papadopoulos et al. 2002). The interval is a pair of order statistics
    x_(l), x_(u) with P(l <= B < u) >= level for B ~ Binomial(n, 1 - fpr), the number of scores up to the true quantile
    (David and Nagaraja 2003, 7.1). Both assume only that rows are independent.

    Args:
        clean_scores: [n], of captions known to be clean; NaN is never flagged and ranks lowest.
        fpr: the false positive rate wanted, in (0, 1).
    Raises:
        AuditError: fpr out of range, no score that is a number, or fewer than `rows_needed` rows.

    >>> threshold_at_fpr(range(1, 101), 0.05)[0]
    96.0
    """
    from scipy.special import bdtr  # type: ignore[import-untyped]

    values = np.asarray(clean_scores, dtype=np.float64)
    if not 0 < fpr < 1:
        raise AuditError(f"a false positive rate lies between 0 and 1, not {fpr:g}: pass for instance --fpr 0.01")
    if not len(values) or np.isnan(values).all():
        raise AuditError(f"none of {len(values)} clean rows has a score: no threshold can be had from them")
    num_rows = len(values)
    allowed = rows_allowed(num_rows, fpr)
    if allowed < 0:
        raise AuditError(
            f"{num_rows:,} clean captions cannot tell a false-positive rate of {fpr:g}: "
            f"give {rows_needed(fpr):,} or more, or pass a higher --fpr"
        )
    # [0] stands below and [n + 1] above every score, so that ranks count from 1.
    ranked = np.concatenate([[-np.inf], np.sort(np.where(np.isnan(values), -np.inf, values)), [np.inf]])
    threshold = float(ranked[num_rows - allowed])
    tail = (1 - level) / 2
    # at_most[i] = P(B <= i - 1), i = 0..n + 1: l is the largest i with it <= tail, u the smallest with >= 1 - tail.
    at_most = np.concatenate([[0.0], bdtr(np.arange(num_rows), num_rows, 1 - fpr), [1.0]])
    low = ranked[np.searchsorted(at_most, tail, side="right") - 1]
    high = ranked[np.searchsorted(at_most, 1 - tail, side="left")]
    return CleanThreshold(threshold, float(low), float(high), num_rows, int((values > threshold).sum()))


def true_rate(num_rows: int, fpr: float, level: float = 0.95) -> tuple[float, float]:
    """What the false-positive rate of `threshold_at_fpr` may truly be: central interval of its exact distribution.

    The chance that a new row lies above the r-th of n independent continuous scores is itself random,
    Beta(n + 1 - r, r); its mean is (n + 1 - r) / (n + 1) (David and Nagaraja 2003, 2.3).

    >>> low, high = true_rate(99, 0.01)  # the highest of 99: 1 % in the mean
    >>> round(low, 5), round(high, 4)
    (0.00026, 0.0366)
    """
    from scipy.special import betaincinv

    above = rows_allowed(num_rows, fpr) + 1
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = (float(betaincinv(above, num_rows + 1 - above, tail)) for tail in tails)
    return low, high


def sample_size_note(num_rows: int, fpr: float) -> str:
    """What a threshold at `fpr` from that many clean rows is worth, in one line for people.

    >>> sample_size_note(500, 0.01)
    'of 500 clean rows 4 lie above it: the true rate is 0.33 % to 2 %; 1,000 clean rows would tell more'
    """
    allowed = rows_allowed(num_rows, fpr)
    low, high = (f"{100 * share:.2g} %" for share in true_rate(num_rows, fpr))
    advice = f"; {math.ceil(ENOUGH_ROWS / fpr):,} clean rows would tell more" if allowed < ENOUGH_ROWS - 1 else ""
    return f"of {num_rows:,} clean rows {allowed or 'none'} lie above it: the true rate is {low} to {high}{advice}"
