"""The rates that are promised, held over 1,000 synthetic audits whose truth is known (bench_promises.py)."""

from __future__ import annotations

import numpy as np
import pytest

from audit.base.errors import AuditError
from audit.statistics.multiple import q_values
from audit.statistics.null import CAPTIONS, PICTURES, Null, draw_rate, sample_needed
from audit.statistics.thresholds import rows_needed, threshold_at_fpr, true_rate
from tests.benchmarks.bench_promises import CALIBRATE, LOCAL, Q_VALUES, Kept, calibrate, false_discoveries, local


def held(case: Kept, exact: bool = True) -> None:
    """The realised rate agrees with the promise; so does, more sharply, the mean of the thresholds' own rates."""
    low, high = case.interval
    assert low <= case.promised and (not exact or case.promised <= high)
    off = case.mean_rate - case.promised
    assert off <= 4 * case.deviation and (not exact or off >= -4 * case.deviation - 0.1 * case.promised)


@pytest.mark.parametrize(("num_rows", "fpr"), CALIBRATE)
def test_calibrate_keeps_its_rate(num_rows: int, fpr: float) -> None:
    """One order statistic further up, the rate of 100 rows at 1 % was 1.95 %, that of 20 at 5 % 9.5 %."""
    case = calibrate(num_rows, fpr)
    held(case)
    assert case.promised <= fpr and case.mean_rate + 4 * case.deviation < fpr + 0.5 / num_rows


@pytest.mark.parametrize(("source", "size", "num_images", "fpr"), LOCAL)
def test_a_local_verdict_keeps_its_rate_whatever_the_number_of_images(
    source: str, size: int, num_images: int, fpr: float
) -> None:
    held(local(source, size, num_images, fpr))


def test_images_that_are_alike_make_a_verdict_stricter_never_laxer() -> None:
    case = local(PICTURES, 1000, 4, 0.05, alike=0.5)
    held(case, exact=False)
    assert case.mean_rate < 0.04


@pytest.mark.simulation
@pytest.mark.parametrize(("size", "clean", "copied", "q"), Q_VALUES)
def test_q_values_bound_the_share_of_false_ones(size: int, clean: int, copied: int, q: float) -> None:
    mean, deviation, found = false_discoveries(size, clean, copied, q)
    assert mean <= q * clean / (clean + copied) + 4 * deviation
    if copied:
        assert mean >= 0.5 * q * clean / (clean + copied) and found > 0.8  # no rate is kept by calling nothing


def test_q_values_by_hand() -> None:
    # 4 tests: 4 x 0.01 / 1, 4 x 0.02 / 2, 4 x 0.03 / 3 are all 0.04, 4 x 0.5 / 4
    np.testing.assert_allclose(q_values([0.5, 0.01, None, 0.03, 0.02]), [0.5, 0.04, np.nan, 0.04, 0.04])
    assert np.isnan(q_values([None, None])).all()


def test_a_null_too_small_for_its_rate_is_refused_with_the_size_that_is_needed() -> None:
    assert [sample_needed(0.01, k) for k in (1, 4, 10, 11, 16)] == [99, 398, 995, 1094, 1592]
    assert draw_rate(0.05, 1) == pytest.approx(0.05)
    with pytest.raises(AuditError, match=r"null of 1591 cannot tell a rate of 0.01: 1592 are needed"):
        Null.of(PICTURES, np.arange(1591.0), 0.01, 16)
    assert np.isfinite(Null.of(PICTURES, np.arange(1592.0), 0.01, 16).threshold)
    with pytest.raises(AuditError, match=r"98 clean captions cannot tell .* 0.01: give 99 or more"):
        threshold_at_fpr(np.arange(98.0), 0.01)
    assert rows_needed(0.01) == 99 and threshold_at_fpr(np.arange(99.0), 0.01).threshold == 98


def test_p_values_by_hand() -> None:
    null = Null.of(CAPTIONS, np.array([0.1, 0.2, 0.3]), 0.5)
    assert [null.p_value(value) for value in (0.05, 0.1, 0.25, 9)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    four = Null.of(PICTURES, np.array([0.1, 0.2, 0.3]), 0.9, draws=4)
    assert four.p_value(0.05) == pytest.approx(1 - (3 / 4) ** 4)  # the smallest of four images
    assert null.p_value(None) is None and Null.given(0.4, 0.05).p_value(0.1) is None


def test_the_interval_of_the_true_rate_covers_it() -> None:
    """Of 1,000 thresholds at 5 % from 200 rows, the true rate of 95 % lies inside, and 2.5 % on either side."""
    rng = np.random.default_rng(1)
    rates = np.array([1 - threshold_at_fpr(rng.random(200), 0.05).threshold for _ in range(1000)])
    low, high = true_rate(200, 0.05)
    for share, expected in ((np.mean(rates < low), 0.025), (np.mean(rates > high), 0.025)):
        assert abs(share - expected) < 4 * np.sqrt(0.025 * 0.975 / 1000)
