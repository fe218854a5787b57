"""Intervals: do they cover what they promise? By simulation with a fixed seed, by exact sums, and by hand."""

from __future__ import annotations

from functools import partial
from math import comb, exp, isnan, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from audit.base.errors import AuditError
from audit.statistics import intervals
from audit.statistics.intervals import cluster_bootstrap, paired_bootstrap, share_interval
from audit.statistics.metrics import auc, max_f1, tpr_at_fpr
from audit.statistics.thresholds import sample_size_note, threshold_at_fpr

STATISTICS = [auc, max_f1, partial(tpr_at_fpr, alpha=0.1)]


def clustered_scores(rng: np.random.Generator, per_class: int = 30, size: int = 5, gap: float = 1.2):
    """Templates of `size` captions that share most of their score: labels, clusters and scores, and the true AUC."""
    labels = np.repeat([True, False], per_class * size)
    clusters = np.repeat(np.arange(2 * per_class), size)
    scores = gap * labels + rng.normal(size=2 * per_class)[clusters] + 0.5 * rng.normal(size=len(labels))
    return scores, labels, clusters, NormalDist().cdf(gap / sqrt(2 * (1 + 0.25)))


# --- cluster bootstrap -----------------------------------------------------------------------------------------------


@pytest.mark.simulation
def test_bootstrap_coverage_by_simulation():
    rng = np.random.default_rng(0)
    covered, covered_by_rows, num_runs = 0, 0, 300
    for run in range(num_runs):
        scores, labels, clusters, truth = clustered_scores(rng)
        low, high = cluster_bootstrap(auc, scores, labels, clusters, num_resamples=300, seed=run)
        covered += low <= truth <= high
        low, high = cluster_bootstrap(auc, scores, labels, num_resamples=300, seed=run)
        covered_by_rows += low <= truth <= high
    # A percentile interval from 30 clusters a class falls a little short of 95 %; the error of 300 runs is 1.3 points.
    assert 0.90 <= covered / num_runs <= 0.98
    # The same data taken as independent rows promise 95 % and hold far less: why clusters are resampled.
    assert covered_by_rows / num_runs < 0.75


@pytest.mark.simulation
def test_bootstrap_equals_the_slow_way_of_copying_rows():
    """Rows really copied, cluster by cluster and class by class: the same distribution, so nearly the same interval."""
    rng = np.random.default_rng(1)
    scores, labels, clusters, _ = clustered_scores(rng, per_class=12)
    by_class = [np.unique(clusters[labels]), np.unique(clusters[~labels])]
    values = []
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(names, len(names)) for names in by_class])
        rows = np.concatenate([np.flatnonzero(clusters == name) for name in drawn])
        values.append(roc_auc_score(labels[rows], scores[rows]))
    expected = np.quantile(values, [0.025, 0.975])
    assert cluster_bootstrap(auc, scores, labels, clusters, num_resamples=4000) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_same_seed_same_interval_however_it_is_cut_into_blocks(statistic, monkeypatch):
    scores, labels, clusters, _ = clustered_scores(np.random.default_rng(2))
    names = np.array([f"template {cluster}" for cluster in clusters])
    first = cluster_bootstrap(statistic, scores, labels, clusters, num_resamples=200, seed=5)
    assert first == cluster_bootstrap(statistic, scores, labels, names, num_resamples=200, seed=5)
    assert first != cluster_bootstrap(statistic, scores, labels, clusters, num_resamples=200, seed=6)
    assert first[0] < float(statistic(scores, labels)) < first[1]
    monkeypatch.setattr(intervals, "BLOCK", 7 * len(scores))
    assert first == cluster_bootstrap(statistic, scores, labels, clusters, num_resamples=200, seed=5)


def test_no_resample_lacks_a_class_even_where_clusters_mix_them():
    # Two clusters hold the only memorised rows beside clean ones, thirty hold clean rows alone.
    clusters = np.array([0, 0, 1, 1, *range(2, 32)])
    labels = np.array([1, 0, 1, 0, *[0] * 30])
    seen = []

    def positives(scores, labels, weights):
        seen.append(weights)
        return weights @ labels

    low, high = cluster_bootstrap(positives, np.arange(34.0), labels, clusters, num_resamples=500)
    assert low == high == 2
    weights = np.concatenate(seen)
    assert weights.shape == (500, 34)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])  # a cluster is drawn whole
    np.testing.assert_array_equal(weights[:, 4:].sum(axis=1), 30)
    assert abs(weights.mean(axis=0) - 1).max() < 0.2  # every cluster is drawn once on average


def test_one_cluster_of_a_class_gives_no_interval():
    scores, labels = np.arange(8.0), [1, 1, 1, 0, 0, 0, 0, 0]
    assert all(map(isnan, cluster_bootstrap(auc, scores, labels, ["a", "a", "a", "b", "c", "d", "e", "f"])))
    result = paired_bootstrap(auc, scores, -scores, labels, ["a", "b", "c", "d", "d", "d", "d", "d"])
    assert result.difference == -1.0 and isnan(result.low) and isnan(result.share_not_above)


def test_rows_without_a_cluster_stand_alone():
    scores, labels, _, _ = clustered_scores(np.random.default_rng(3), per_class=4)
    alone = cluster_bootstrap(auc, scores, labels, None, num_resamples=100)
    assert cluster_bootstrap(auc, scores, labels, [None] * 40, num_resamples=100) == alone
    assert cluster_bootstrap(auc, scores, labels, [float("nan")] * 40, num_resamples=100) == alone
    with pytest.raises(ValueError, match="one row of 40"):
        cluster_bootstrap(auc, scores, labels, ["a"] * 39)


def test_bootstrap_names_the_missing_class():
    with pytest.raises(AuditError, match="no positive"):
        cluster_bootstrap(auc, [1.0, 2.0], [0, 0])
    with pytest.raises(AuditError, match="no negative"):
        paired_bootstrap(auc, [1.0, 2.0], [1.0, 2.0], [1, 1])


# --- paired bootstrap ------------------------------------------------------------------------------------------------


def test_paired_difference_is_seen_where_two_separate_intervals_overlap():
    scores, labels, clusters, _ = clustered_scores(np.random.default_rng(4))
    worse = scores - 0.4 * labels  # the same errors, less separation
    result = paired_bootstrap(auc, scores, worse, labels, clusters)
    assert result.difference == pytest.approx(auc(scores, labels) - auc(worse, labels))
    assert 0 < result.low < result.difference < result.high
    assert result.share_not_above == 0.0
    assert cluster_bootstrap(auc, worse, labels, clusters)[1] > cluster_bootstrap(auc, scores, labels, clusters)[0]
    swapped = paired_bootstrap(auc, worse, scores, labels, clusters)
    assert swapped[:3] == pytest.approx((-result.difference, -result.high, -result.low))
    assert swapped.share_not_above == 1.0


def test_a_score_is_no_better_than_itself_in_another_unit():
    scores, labels, clusters, _ = clustered_scores(np.random.default_rng(5))
    assert paired_bootstrap(auc, scores, 10 * scores + 3, labels, clusters) == (0.0, 0.0, 0.0, 1.0)


# --- shares ----------------------------------------------------------------------------------------------------------


def test_share_intervals_by_hand():
    # None of n: high solves (1 - p)^n = 0.025. All of n: the mirror image.
    assert share_interval(0, 20) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert share_interval(20, 20) == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert share_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        share_interval(3, 2)


def test_share_interval_covers_every_true_share():
    """Exact: the chance of each count of 25, summed over the counts whose interval holds the truth."""
    cover = [share_interval(count, 25) for count in range(26)]
    for truth in np.linspace(0.005, 0.995, 100):
        chance = [comb(25, k) * truth**k * (1 - truth) ** (25 - k) for k in range(26)]
        assert sum(p for p, (low, high) in zip(chance, cover, strict=True) if low <= truth <= high) >= 0.95


# --- thresholds from clean rows --------------------------------------------------------------------------------------


def test_threshold_leaves_a_new_row_the_chance_that_was_asked_for():
    clean = np.random.default_rng(6).permutation(1000) / 10
    result = threshold_at_fpr(clean, 0.01)
    # floor(1001 x 0.01) = 10 of the 1001 gaps lie above the threshold: 9 of the rows
    assert result.threshold == 99.0 and result.num_above == 9 and result.num_rows == 1000
    assert result.low < result.threshold < result.high


def test_threshold_uses_the_whole_of_the_rate_at_every_percentage():
    for percent in range(1, 100):
        assert threshold_at_fpr(np.arange(99), percent / 100).num_above == percent - 1


def test_threshold_never_splits_ties():
    # Six rows share the highest score: four may be flagged, so none is.
    result = threshold_at_fpr([1.0] * 94 + [2.0] * 6, 0.05)
    assert result.threshold == 2.0 and result.num_above == 0
    assert threshold_at_fpr([1.0] * 96 + [2.0] * 4, 0.05)[::4] == (1.0, 4)


def test_the_fewest_rows_give_the_highest_score_and_an_open_interval():
    result = threshold_at_fpr(np.arange(99), 0.01)
    assert result.threshold == 98 and result.num_above == 0 and result.high == np.inf


def test_nan_clean_rows_count_and_are_never_flagged():
    result = threshold_at_fpr([float("nan")] * 50 + list(range(50)), 0.1)
    assert result.threshold == 40.0 and result.num_above == 9 and result.num_rows == 100


def test_threshold_interval_by_hand():
    # Median of 10 rows, B ~ Binomial(10, 1/2): P(B <= 1) = 11/1024 <= 2.5 % < P(B <= 2), so x_(2);
    # P(B <= 8) >= 97.5 % > P(B <= 7), so x_(9): the textbook interval of 97.9 %.
    assert threshold_at_fpr(np.arange(1.0, 11.0), 0.5)[:3] == (6.0, 2.0, 9.0)


@pytest.mark.parametrize("fpr, num_rows", [(0.05, 300), (0.01, 1000)])
def test_threshold_interval_coverage_by_simulation(fpr: float, num_rows: int):
    """Whatever the distribution: the true quantile of log-normal scores is inside at least 95 % of the time."""
    rng = np.random.default_rng(7)
    truth = exp(NormalDist().inv_cdf(1 - fpr))
    results = [threshold_at_fpr(rng.lognormal(size=num_rows), fpr) for _ in range(1000)]
    covered = np.mean([result.low <= truth <= result.high for result in results])
    assert 0.94 <= covered <= 0.99
    # And on new clean captions the threshold keeps the rate on average.
    realised = np.mean([1 - NormalDist().cdf(np.log(result.threshold)) for result in results])
    assert realised == pytest.approx(np.floor(fpr * (num_rows + 1)) / (num_rows + 1), rel=0.05)


def test_thresholds_that_cannot_be_had():
    with pytest.raises(AuditError, match="--fpr"):
        threshold_at_fpr([1.0, 2.0], 0.0)
    with pytest.raises(AuditError, match="none of 0 clean rows"):
        threshold_at_fpr([], 0.01)
    with pytest.raises(AuditError, match="none of 2 clean rows"):
        threshold_at_fpr([float("nan")] * 2, 0.01)


def test_sample_size_note_says_what_the_rows_are_worth():
    assert sample_size_note(500, 0.01).startswith("of 500 clean rows 4 lie above it: the true rate is 0.33 % to 2 %;")
    assert "1,000 clean rows would tell more" in sample_size_note(500, 0.01)
    assert sample_size_note(99, 0.01).startswith(
        "of 99 clean rows none lie above it: the true rate is 0.026 % to 3.7 %;"
    )
    assert sample_size_note(10_000, 0.01) == "of 10,000 clean rows 99 lie above it: the true rate is 0.81 % to 1.2 %"
