"""How sure a figure is: bootstrap intervals of metrics, exact intervals of shares.

The conventions of `audit.statistics.metrics` hold: ``score > threshold`` flags; a NaN score is never flagged but counts
as a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from audit.statistics.metrics import BoolArray, FloatArray, check_scores

BLOCK = 1_000_000  # resamples x rows held at once by a bootstrap (8 MB a float64 array)


class Statistic(Protocol):
    """A metric the bootstraps resample: `auc`, `max_f1`, ``functools.partial(tpr_at_fpr, alpha=0.01)`` or one's own."""

    def __call__(self, scores: FloatArray, labels: BoolArray, weights: FloatArray, /) -> FloatArray:
        """scores [n], labels [n], weights [R, n] -> [R]."""


def _cluster_codes(clusters: npt.ArrayLike | None, num_rows: int) -> npt.NDArray[np.intp]:
    """Cluster of each row as 0..k-1; a row without one (None, NaN, or no clusters given) is a cluster of its own."""
    if clusters is None:
        return np.arange(num_rows)
    names = np.asarray(clusters, dtype=object)
    if names.shape != (num_rows,):
        raise ValueError(f"clusters {names.shape} must be one row of {num_rows}, as the scores are")
    codes: dict[object, int] = {}
    # An object() equals nothing but itself; NaN is what pandas makes of a missing name.
    keys = (object() if name is None or name != name else name for name in names)
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.intp)


def _resamples(
    labels: BoolArray, clusters: npt.ArrayLike | None, num_resamples: int, seed: int
) -> Iterator[FloatArray]:
    """Row weights of cluster resamples, in blocks [r, n]; nothing when a class lies in fewer than two clusters.

    Strata are the clusters of memorised rows, of clean rows and of both; each is resampled to its own number of
    clusters, so every resample holds both classes.
    """
    codes = _cluster_codes(clusters, len(labels))
    num_clusters = int(codes.max()) + 1
    has_positive = np.bincount(codes, labels, num_clusters) > 0
    has_negative = np.bincount(codes, ~labels, num_clusters) > 0
    if min(has_positive.sum(), has_negative.sum()) < 2:
        return
    strata = [has_positive & ~has_negative, has_negative & ~has_positive, has_positive & has_negative]
    # One stream a stratum: the draws do not depend on how they are cut into blocks.
    streams = np.random.default_rng(seed).spawn(len(strata))
    block = max(1, BLOCK // len(labels))
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        counts = np.zeros((size, num_clusters))
        for members, stream in zip(map(np.flatnonzero, strata), streams, strict=True):
            if len(members):
                draws = stream.integers(len(members), size=(size, len(members)))
                draws += len(members) * np.arange(size)[:, None]
                counts[:, members] = np.bincount(draws.ravel(), minlength=size * len(members)).reshape(size, -1)
        yield counts[:, codes]


def _percentiles(values: FloatArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cluster_bootstrap(
    statistic: Statistic,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric, resampling whole clusters with replacement.

    Captions of one template, or equal captions, are not independent: resampling rows would claim more than the data
    hold. Classes are resampled apart, so no resample lacks one. A metric at its limit (AUC of exactly 1) gives an
    interval of no width: the bootstrap cannot see beyond the sample.

    Args:
        statistic: `auc`, `max_f1`, ``functools.partial(tpr_at_fpr, alpha=0.01)``.
        scores, labels: [n], as the statistic takes them.
        clusters: [n], strings or integers; None in it, or None for all, makes a row its own cluster.
        num_resamples: resamples drawn.
        seed: same seed, same interval.
        level: coverage, in (0, 1).
    Returns:
        (low, high); (nan, nan) when one of the classes lies in fewer than two clusters, which say nothing about others.
    Raises:
        AuditError: a class is missing.
        ValueError: lengths differ.
    """
    values, truth = check_scores(scores, labels)
    drawn = [statistic(values, truth, weights) for weights in _resamples(truth, clusters, num_resamples, seed)]
    return _percentiles(np.concatenate(drawn), level) if drawn else (np.nan, np.nan)


class PairedDifference(NamedTuple):
    """Statistic of a minus statistic of b on the same rows."""

    difference: float
    low: float
    high: float
    share_not_above: float  # share of resamples with a difference <= 0: small when a is better


def paired_bootstrap(
    statistic: Statistic,
    scores_a: npt.ArrayLike,
    scores_b: npt.ArrayLike,
    labels: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Is score a better than score b? Bootstrap of the difference, both measured on the same resamples.

    Args and Raises as `cluster_bootstrap`, with two scores [n] of the same rows.
    Returns:
        The difference, its percentile interval and the share of resamples in which a is not better; the last three
        are NaN when one of the classes lies in fewer than two clusters.
    """
    (a, truth), (b, _) = check_scores(scores_a, labels), check_scores(scores_b, labels)
    everything = np.ones((1, len(truth)))
    difference = float((statistic(a, truth, everything) - statistic(b, truth, everything))[0])
    blocks = _resamples(truth, clusters, num_resamples, seed)
    drawn = [statistic(a, truth, weights) - statistic(b, truth, weights) for weights in blocks]
    if not drawn:
        return PairedDifference(difference, np.nan, np.nan, np.nan)
    differences = np.concatenate(drawn)
    return PairedDifference(difference, *_percentiles(differences, level), float((differences <= 0).mean()))


def share_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share: exact, so it covers the true share at least `level` of the time.

    low = Beta^-1(a/2; k, n-k+1), high = Beta^-1(1-a/2; k+1, n-k), a = 1 - level (Clopper and Pearson 1934).

    Args:
        count: k, rows that have the property.
        total: n, rows looked at; they must be independent.
    Returns:
        (low, high); (0, 1) for no rows.
    Raises:
        ValueError: not 0 <= count <= total.

    >>> low, high = share_interval(0, 300)  # none in 300: the "rule of three" for a one-sided 95 %
    >>> low, round(high, 4)
    (0.0, 0.0122)
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no share")
    if not total:
        return 0.0, 1.0
    found = binomtest(count, total).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)
