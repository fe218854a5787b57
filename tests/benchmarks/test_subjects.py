"""What first-step scores are compared by: rates at a tail and intervals of what one score finds more than another."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.bench_components import at_the_tail
from tests.benchmarks.subjects import Side, auc, tpr

CLEAN = np.arange(1000.0)
HALF = np.repeat(["a", "b"], 2)  # two templates of two captions


def test_no_more_than_the_rate_are_flagged_with_nothing_interpolated() -> None:
    copied = np.array([999.5, 990.5, 989.5, 0.5])
    assert tpr(copied, CLEAN, 0.01) == 0.75  # ten of a thousand may be flagged: 990 to 999
    assert tpr(copied, CLEAN, 0.001) == 0.25  # one: 999
    assert auc(np.array([0.0, 999.0]), CLEAN) == pytest.approx((0.5 + 999.5) / 2000)
    # thresholds 999, 998, ..., 989: the first copied exceeds all eleven, the second two, the third one
    assert at_the_tail(copied, CLEAN) == pytest.approx((11 + 2 + 1) / 44)


def side(clean: int = 1000) -> Side:
    clusters = np.concatenate([HALF, [f"unseen-{at}" for at in range(clean)]])
    copied = np.arange(len(clusters)) < 4
    return Side(clusters, copied, ~copied)


def test_a_gain_is_of_the_same_templates_clean_captions_and_noises() -> None:
    noise = np.random.default_rng(1).permutation(CLEAN)
    poor = [np.concatenate([np.array([2000.0, 2000, 0, 0]), noise + shift]) for shift in (0, 1)]
    # the same but for b's first caption: what is drawn moves both alike, and half of b is gained whenever b is drawn
    good = [np.concatenate([each[:2], [2000.0], each[3:]]) for each in poor]
    low, high = side().gain("TPR@1%FPR", good, poor, 200)
    assert (low, high) == (0.0, 0.5)
    assert side().gain("AUC", poor, poor, 50) == (0.0, 0.0)
    wide = side().interval("TPR@1%FPR", poor, 200)
    assert wide == (0.0, 1.0)
