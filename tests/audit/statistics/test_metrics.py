"""Metrics against hand-computed values, slow brute force over every threshold, and scikit-learn."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from audit.base.errors import AuditError
from audit.statistics.metrics import auc, best_f1, best_iou, confusion, iou_at, max_f1, pixel_auc, roc, tpr_at_fpr

NAN = float("nan")


def random_case(seed: int, num_rows: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, NaN and an infinity; labels of both classes; whole-number weights."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, num_rows).astype(float)
    scores[rng.random(num_rows) < 0.1] = NAN
    scores[0] = np.inf
    labels = rng.random(num_rows) < 0.4
    labels[:2] = True, False
    return scores, labels, rng.integers(0, 4, (5, num_rows)) + np.eye(5, num_rows)


def brute_force(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, int, int]]:
    """(threshold, true positives, false positives) of every decision `score > threshold`, one by one."""
    thresholds = [np.inf, -np.inf, *scores[np.isfinite(scores)]]
    return [
        (
            t,
            sum(bool(s > t) and bool(y) for s, y in zip(scores, labels, strict=True)),
            sum(s > t and not y for s, y in zip(scores, labels, strict=True)),
        )
        for t in thresholds
    ]


def pairwise_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition: how often a memorised row ranks above a clean one, NaN lowest, ties half."""
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    pairs = list(product(ranked[labels], ranked[~labels]))
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_tied_scores_by_hand():
    # Pairs (memorised, clean): (3,2) 1, (3,1) 1, (2,2) 1/2, (2,1) 1 -> 3.5 / 4.
    scores, labels = [3.0, 2.0, 2.0, 1.0], [1, 1, 0, 0]
    assert auc(scores, labels) == 0.875
    # > 2 flags one memorised row: F1 = 2*1/(1+2) = 2/3. > 1 flags three rows, two memorised: 4/5.
    assert best_f1(scores, labels) == (0.8, 1.0)
    # The tie at 2 cannot be split: the second memorised row costs half of the clean ones.
    assert tpr_at_fpr(scores, labels, alpha=0.49) == 0.5
    assert tpr_at_fpr(scores, labels, alpha=0.5) == 1.0


def test_constant_scores_say_nothing():
    scores, labels = [7.0] * 10, [1] * 2 + [0] * 8
    assert auc(scores, labels) == 0.5
    assert tpr_at_fpr(scores, labels, alpha=0.99) == 0.0
    # Flag all: precision 0.2, recall 1, F1 = 0.4 / 1.2.
    f1, threshold = best_f1(scores, labels)
    assert f1 == pytest.approx(1 / 3) and threshold == -np.inf


def test_nan_is_never_flagged_but_counts():
    scores, labels = [NAN, 2.0, 1.0, NAN], [1, 1, 0, 0]
    # Pairs: (nan,1) 0, (nan,nan) 1/2, (2,1) 1, (2,nan) 1.
    assert auc(scores, labels) == 0.625
    # The missing memorised row stays in the denominator even when every false positive is allowed.
    assert tpr_at_fpr(scores, labels, alpha=1.0) == 0.5
    # > 1 flags one memorised row of two: 2*1 / (1 + 2).
    f1, threshold = best_f1(scores, labels)
    assert f1 == pytest.approx(2 / 3) and threshold == 1.0
    # A missing clean row is no false alarm: one clean row of two is flagged at most.
    assert roc(scores, labels)[0].tolist() == [0.0, 0.0, 0.5, 1.0]


def test_scores_that_are_all_nan_flag_nothing():
    assert auc([NAN] * 4, [1, 1, 0, 0]) == 0.5
    assert tpr_at_fpr([NAN] * 4, [1, 1, 0, 0], alpha=1.0) == 0.0
    assert best_f1([NAN] * 4, [1, 1, 0, 0])[0] == 0.0


def test_infinite_scores_are_ordinary_scores():
    scores, labels = [np.inf, 1.0, 0.0, -np.inf], [1, 0, 1, 0]
    assert auc(scores, labels) == 0.75
    assert tpr_at_fpr(scores, labels, alpha=0.0) == 0.5


def test_the_false_positive_rate_is_never_exceeded():
    # 100 clean rows 1..100, memorised rows just above some of them.
    clean = np.arange(1, 101)
    scores, labels = np.append(clean, [99.5, 98.5, 50.5]), np.append(np.zeros(100), np.ones(3))
    assert tpr_at_fpr(scores, labels, alpha=0.001) == 0.0
    assert tpr_at_fpr(scores, labels, alpha=0.0099) == 0.0
    assert tpr_at_fpr(scores, labels, alpha=0.01) == pytest.approx(1 / 3)
    assert tpr_at_fpr(scores, labels, alpha=0.02) == pytest.approx(2 / 3)


def test_a_rate_equal_to_alpha_is_allowed_for_every_percentage():
    # Floating point is the trap: 0.29 * 100 is less than 29.
    labels = np.append(np.zeros(100), 1)
    for percent in range(1, 100):
        scores = np.append(np.arange(100), 99.5 - percent)
        assert tpr_at_fpr(scores, labels, alpha=percent / 100) == 1.0
        assert tpr_at_fpr(scores, labels, alpha=(percent - 0.5) / 100) == 0.0


# --- independent references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_brute_force_over_thresholds(seed: int):
    scores, labels, _ = random_case(seed)
    decisions, num_positive, num_negative = brute_force(scores, labels), labels.sum(), (~labels).sum()
    assert auc(scores, labels) == pytest.approx(pairwise_auc(scores, labels), abs=1e-12)
    for alpha in (0.0, 0.05, 0.1, 0.5, 1.0):
        expected = max(tp / num_positive for _, tp, fp in decisions if fp / num_negative <= alpha)
        assert tpr_at_fpr(scores, labels, alpha=alpha) == pytest.approx(expected, abs=1e-12)
    f1, threshold = best_f1(scores, labels)
    assert f1 == pytest.approx(max(2 * tp / (tp + fp + num_positive) for _, tp, fp in decisions), abs=1e-12)
    # The threshold means what it says when a user applies it to the raw scores, NaN included.
    assert f1 == pytest.approx(f1_score(labels, scores > threshold), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_whole_number_weight_is_the_row_that_many_times(seed: int):
    scores, labels, weights = random_case(seed)
    weighted = (
        auc(scores, labels, weights),
        max_f1(scores, labels, weights),
        tpr_at_fpr(scores, labels, weights, alpha=0.2),
    )
    for resample, counts in enumerate(weights.astype(int)):
        copied, copied_labels = np.repeat(scores, counts), np.repeat(labels, counts)
        assert weighted[0][resample] == pytest.approx(pairwise_auc(copied, copied_labels), abs=1e-12)
        assert weighted[1][resample] == pytest.approx(best_f1(copied, copied_labels)[0], abs=1e-12)
        assert weighted[2][resample] == pytest.approx(tpr_at_fpr(copied, copied_labels, alpha=0.2), abs=1e-12)


def test_equal_to_scikit_learn_on_float32_scores():
    rng = np.random.default_rng(0)
    labels = rng.random(2000) < 0.3
    scores = (rng.normal(size=2000) + labels).astype(np.float32)
    assert auc(scores, labels) == roc_auc_score(labels, scores)
    assert auc(scores, labels, np.ones((1, 2000)))[0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    for ours, theirs in zip(roc(scores, labels), roc_curve(labels, scores)[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- what a user gets wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [auc, roc, best_f1, max_f1])
def test_a_missing_class_is_named(metric):
    with pytest.raises(AuditError, match=r"no positive \(memorised\) row among 3"):
        metric([1.0, 2.0, 3.0], [0, 0, 0])
    with pytest.raises(AuditError, match=r"no negative \(clean\) row among 3"):
        metric([1.0, 2.0, 3.0], [True, True, True])
    with pytest.raises(AuditError, match="among 0"):
        metric([], [])


def test_labels_other_than_two_classes_are_refused():
    with pytest.raises(AuditError, match="must be 0"):
        auc([1.0, 2.0, 3.0], [0, 1, 2])
    with pytest.raises(AuditError, match="must be 0"):
        auc([1.0, 2.0], ["local", None])
    with pytest.raises(AuditError, match="must be 0"):
        auc([1.0, 2.0, 3.0], [0.0, 1.0, NAN])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="same length"):
        auc([1.0, 2.0], [0, 1, 1])


# --- masks -----------------------------------------------------------------------------------------------------------


def test_mask_metrics_by_hand():
    mask = np.array([[0.9, 0.8], [0.5, 0.1]])
    region = np.array([[True, False], [True, False]])
    # Pairs (inside, outside): .9 beats both, .5 beats .1 only -> 3 / 4.
    assert pixel_auc(mask, region) == 0.75
    # > .1 flags three pixels, two inside: 2/3; > .8 flags one, inside: 1/2; all four: 1/2.
    iou, threshold = best_iou(mask, region)
    assert iou == pytest.approx(2 / 3) and threshold == 0.1
    assert iou_at(mask, region, threshold) == iou
    assert iou_at(mask, region, 0.8) == 0.5
    assert iou_at(mask, region, 0.9) == 0.0
    assert iou_at(mask, region, -np.inf) == 0.5


def test_a_constant_mask_is_worth_the_whole_picture():
    region = np.zeros((4, 4), dtype=bool)
    region[:2, :2] = True
    assert pixel_auc(np.full((4, 4), 0.3), region) == 0.5
    assert best_iou(np.full((4, 4), 0.3), region) == (0.25, -np.inf)


@pytest.mark.parametrize("seed", range(10))
def test_best_iou_is_the_best_of_all_thresholds(seed: int):
    rng = np.random.default_rng(seed)
    mask, region = rng.integers(0, 6, (6, 5)) / 5, rng.random((6, 5)) < 0.4
    iou, threshold = best_iou(mask, region)
    assert iou == pytest.approx(max(iou_at(mask, region, t) for t in [-np.inf, *np.unique(mask)]), abs=1e-12)
    assert iou == pytest.approx(iou_at(mask, region, threshold), abs=1e-12)


@pytest.mark.parametrize("metric", [pixel_auc, best_iou, lambda mask, region: iou_at(mask, region, 0.5)])
def test_a_mask_cannot_be_judged_without_a_region(metric):
    with pytest.raises(AuditError, match="covers nothing"):
        metric(np.ones((2, 2)), np.zeros((2, 2), dtype=bool))
    with pytest.raises(AuditError, match="covers all"):
        metric(np.ones((2, 2)), np.ones((2, 2), dtype=bool))
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        metric(np.ones((4, 4)), np.eye(2, dtype=bool))


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_confusion_counts_every_pair_of_names():
    table = confusion(
        ["global", "local", "local", "none", "none", "local"],
        ["global", "local", "none", "none", "no_reference", "local"],
    )
    assert table.labels == ("global", "local", "none")
    assert table.verdicts == ("global", "local", "no_reference", "none")
    assert table.counts.tolist() == [[1, 0, 0, 0], [0, 2, 0, 1], [0, 0, 1, 1]]
    assert confusion([], []).counts.shape == (0, 0)
    with pytest.raises(ValueError, match="argument 2"):
        confusion(["local"], [])
