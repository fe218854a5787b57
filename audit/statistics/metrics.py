"""How good a score or a mask is: the metrics of the evaluation, as pure functions on arrays.

`audit.statistics.intervals` says how sure each figure is.

Conventions, the same everywhere:

- A higher score means "more memorised"; label 1 (True) is memorised, 0 (False) is clean.
- A row is flagged when ``score > threshold``, so rows with equal scores are flagged together or not at all.
- A NaN score is never flagged, whatever the threshold (NumPy's own ``nan > x``), and still counts as a row: a
  memorised one is missed, a clean one is no false alarm. To the ranking metrics it is the lowest score there is.
- ``weights`` [R, n] holds R weightings of the rows, non-negative; a metric then returns R values, shape [R]. That is
  how the bootstrap resamples without copying rows: the weight of a row is how often it was drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from audit.base.errors import AuditError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Curve(NamedTuple):
    """What each threshold flags; entry 0 flags nothing, the last one everything but NaN and -inf."""

    thresholds: FloatArray  # [G], falling
    tp: FloatArray  # [R, G], weight of memorised rows above each threshold
    fp: FloatArray  # [R, G], weight of clean rows above each threshold
    positives: FloatArray  # [R, 1], weight of all memorised rows, NaN scores included
    negatives: FloatArray  # [R, 1], weight of all clean rows, NaN scores included


def check_scores(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """What every metric checks first.

    Returns:
        Scores [n] float64 with NaN as -inf, and labels [n] bool that hold both classes.
    Raises:
        AuditError: a class is missing (the message says which), or labels are not 0 and 1.
        ValueError: lengths differ.
    """
    values, given = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != given.shape:
        raise ValueError(f"scores {values.shape} and labels {given.shape} must be one row of the same length")
    known = np.isin(given, (0, 1))
    if not known.all():
        raise AuditError(f"labels must be 0 (clean) or 1 (memorised), found {given[~known][:3].tolist()}")
    truth = given.astype(bool)
    if truth.all() or not truth.any():
        missing, present = ("positive (memorised)", "clean") if not truth.any() else ("negative (clean)", "memorised")
        raise AuditError(f"no {missing} row among {len(truth)} labels, all are {present}: label rows of both classes")
    return np.where(np.isnan(values), -np.inf, values), truth


def _curve(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray | None) -> Curve:
    """Weight above every distinct score, by one sort and two cumulative sums."""
    values, truth = check_scores(scores, labels)
    weights = np.ones((1, len(values))) if weights is None else weights
    order = np.argsort(-values, kind="stable")
    values, truth, weights = values[order], truth[order], weights[:, order]
    last_of_tie = np.append(values[1:] != values[:-1], True)
    groups = np.flatnonzero(last_of_tie & (values > -np.inf))
    tp, fp = np.cumsum(weights * truth, axis=1), np.cumsum(weights * ~truth, axis=1)
    nothing = np.zeros((len(weights), 1))
    return Curve(
        thresholds=np.append(values[groups], -np.inf),
        tp=np.hstack([nothing, tp[:, groups]]),
        fp=np.hstack([nothing, fp[:, groups]]),
        positives=tp[:, -1:],
        negatives=fp[:, -1:],
    )


def _ranks(values: FloatArray) -> npt.NDArray[np.intp]:
    """Dense ranks: what scikit-learn sees, since it refuses infinite scores and only the order matters to it."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)


@overload
def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float: ...
@overload
def auc(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray) -> FloatArray: ...
def auc(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray | None = None) -> float | FloatArray:
    """Area under the ROC curve: P(memorised score > clean score) + P(equal) / 2 over random pairs.

    Args:
        scores: [n], higher is more memorised; NaN ranks lowest.
        labels: [n], 0 or 1.
        weights: [R, n], see the module.
    Returns:
        A share in [0, 1], 0.5 for constant scores; [R] when weights are given.
    Raises:
        AuditError: a class is missing (the message says which), or labels are not 0 and 1.
        ValueError: lengths differ.

    >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    if weights is None:
        from sklearn.metrics import roc_auc_score

        values, truth = check_scores(scores, labels)
        return float(roc_auc_score(truth, _ranks(values)))
    curve = _curve(scores, labels, weights)
    # Rows no threshold flags (NaN) are one last tie: a straight line to (negatives, positives).
    tp, fp = np.hstack([curve.tp, curve.positives]), np.hstack([curve.fp, curve.negatives])
    area = (np.diff(fp, axis=1) * (tp[:, 1:] + tp[:, :-1])).sum(axis=1) / 2
    return area / (curve.positives * curve.negatives)[:, 0]


def roc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The ROC curve for plotting, corners only: false and true positive rate from (0, 0) to (1, 1).

    Args:
        scores: [n], higher is more memorised; NaN rows are one tie at the end of the curve.
        labels: [n], 0 or 1.
    Returns:
        fpr [P], tpr [P], both rising.
    Raises:
        As `auc`.

    >>> [rate.tolist() for rate in roc([1.0, 2.0, 3.0], [0, 0, 1])]
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    from sklearn.metrics import roc_curve

    values, truth = check_scores(scores, labels)
    fpr, tpr, _ = roc_curve(truth, _ranks(values))
    return fpr, tpr


def _f1(curve: Curve) -> FloatArray:
    """F1 = 2 TP / (TP + FP + P) at every threshold, [R, G]."""
    return 2 * curve.tp / (curve.tp + curve.fp + curve.positives)


def best_f1(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
    """Largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds, and the threshold that gives it.

    The threshold is the highest score that is NOT flagged (``score > threshold`` flags); -inf when flagging every row
    is best, as with constant scores. Among equal F1 the highest threshold, which flags the fewest rows, is taken.
    It is chosen on the rows it is measured on, so it flatters: `audit.statistics.thresholds.threshold_at_fpr` on clean
    captions gives a threshold to act on.

    Args:
        scores: [n], higher is more memorised.
        labels: [n], 0 or 1.
    Returns:
        (f1, threshold).
    Raises:
        As `auc`.

    >>> best_f1([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    (0.8, 0.1)
    """
    curve = _curve(scores, labels, None)
    f1 = _f1(curve)[0]
    best = int(f1.argmax())
    return float(f1[best]), float(curve.thresholds[best])


@overload
def max_f1(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float: ...
@overload
def max_f1(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray) -> FloatArray: ...
def max_f1(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray | None = None) -> float | FloatArray:
    """The F1 of `best_f1` without its threshold, which is chosen anew in each of the R weightings: a `Statistic`."""
    best = _f1(_curve(scores, labels, weights)).max(axis=1)
    return float(best[0]) if weights is None else best


@overload
def tpr_at_fpr(scores: npt.ArrayLike, labels: npt.ArrayLike, *, alpha: float) -> float: ...
@overload
def tpr_at_fpr(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray, *, alpha: float) -> FloatArray: ...
def tpr_at_fpr(
    scores: npt.ArrayLike, labels: npt.ArrayLike, weights: FloatArray | None = None, *, alpha: float
) -> float | FloatArray:
    """Largest true positive rate whose false positive rate is at most alpha.

    Strict: only rates a threshold really reaches count, nothing is interpolated between them, and tied scores are
    flagged together. With fewer than 1 / alpha clean rows no false positive is allowed at all.

    Args:
        scores: [n], higher is more memorised.
        labels: [n], 0 or 1.
        weights: [R, n], see the module.
        alpha: the largest false positive rate allowed, in [0, 1].
    Returns:
        A share in [0, 1]; [R] when weights are given.
    Raises:
        As `auc`.

    >>> tpr_at_fpr([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], alpha=0.01)
    0.5
    """
    curve = _curve(scores, labels, weights)
    # Divide, then compare: 29 / 100 <= 0.29 holds in floating point, 29 <= 0.29 * 100 does not.
    allowed = curve.fp / curve.negatives <= alpha
    best = np.where(allowed, curve.tp / curve.positives, 0.0).max(axis=1)
    return float(best[0]) if weights is None else best


def pixel_auc(mask: npt.ArrayLike, region: npt.ArrayLike) -> float:
    """ROC AUC of a mask as a detector of the pixels of the true region; 0.5 for a constant mask.

    Args:
        mask: [H, W], any scale, higher inside the memorised region.
        region: [H, W], bool.
    Returns:
        A share in [0, 1].
    Raises:
        AuditError: the region covers all of the picture or nothing.
        ValueError: shapes differ.
    """
    return auc(*_pixels(mask, region))


def best_iou(mask: npt.ArrayLike, region: npt.ArrayLike) -> tuple[float, float]:
    """Largest intersection over union of ``mask > threshold`` with the true region, and that threshold.

    The threshold knows the answer, so this is the most the mask could give; `iou_at` is what a fixed one gives.
    Args and Raises as `pixel_auc`.

    Returns:
        (iou, threshold); the threshold is -inf when all pixels do best.
    """
    curve = _curve(*_pixels(mask, region), None)
    iou = (curve.tp / (curve.positives + curve.fp))[0]
    best = int(iou.argmax())
    return float(iou[best]), float(curve.thresholds[best])


def iou_at(mask: npt.ArrayLike, region: npt.ArrayLike, threshold: float) -> float:
    """Intersection over union of ``mask > threshold`` with the true region. Args and Raises as `pixel_auc`."""
    values, truth = _pixels(mask, region)
    flagged = values > threshold
    return float((flagged & truth).sum() / (flagged | truth).sum())


def _pixels(mask: npt.ArrayLike, region: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """Mask and region as flat rows [H * W]."""
    values, truth = np.asarray(mask, dtype=np.float64), np.asarray(region, dtype=bool)
    if values.ndim != 2 or values.shape != truth.shape:
        raise ValueError(f"mask {values.shape} and region {truth.shape} must be one [H, W]")
    if truth.all() or not truth.any():
        raise AuditError(
            f"the true region covers {'all' if truth.all() else 'nothing'} of the picture: no mask can be judged"
        )
    return values.ravel(), truth.ravel()


class Confusion(NamedTuple):
    """How often each label was given each verdict."""

    labels: tuple[str, ...]  # [L], sorted
    verdicts: tuple[str, ...]  # [V], sorted
    counts: npt.NDArray[np.int64]  # [L, V]


def confusion(labels: Sequence[str], verdicts: Sequence[str]) -> Confusion:
    """Table of labels against verdicts; the two need not share their names.

    Args:
        labels: [n], what each caption is.
        verdicts: [n], what the audit said.
    Raises:
        ValueError: lengths differ.

    >>> confusion(["local", "none", "local"], ["local", "none", "none"]).counts.tolist()
    [[1, 1], [0, 1]]
    """
    pairs = Counter(zip(labels, verdicts, strict=True))
    rows, columns = (tuple(sorted(set(names))) for names in (labels, verdicts))
    counts = np.array([[pairs[row, column] for column in columns] for row in rows], dtype=np.int64)
    return Confusion(rows, columns, counts.reshape(len(rows), len(columns)))
