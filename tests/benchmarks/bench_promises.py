"""Do the rates hold that calibrate, the local verdict and the q-values promise? 1,000 synthetic audits of each.

    python -m tests.benchmarks.bench_promises

Every audit draws a null, makes a threshold of it by the code that audits use, and judges what it has not seen; the
truth is known because it was drawn. Takes seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from audit.statistics.intervals import share_interval
from audit.statistics.multiple import q_values
from audit.statistics.null import CAPTIONS, PICTURES, Null
from audit.statistics.thresholds import rows_allowed, threshold_at_fpr

AUDITS = 1000


class Kept(NamedTuple):
    """Of AUDITS audits: how often a judgement was false, one judgement an audit, and what was promised."""

    what: str
    promised: float  # the exact chance of a false judgement
    false: int
    mean_rate: float  # mean over audits of the chance that their own threshold has
    deviation: float  # standard deviation of that mean

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the realised rate."""
        return share_interval(self.false, AUDITS)


def calibrate(num_rows: int, fpr: float, seed: int = 0) -> Kept:
    """A threshold from `num_rows` clean scores (uniform: whatever the distribution, only the order matters)."""
    rng = np.random.default_rng(seed)
    thresholds = np.array([threshold_at_fpr(rng.random(num_rows), fpr).threshold for _ in range(AUDITS)])
    rates, false = 1 - thresholds, int((rng.random(AUDITS) > thresholds).sum())
    exact = (rows_allowed(num_rows, fpr) + 1) / (num_rows + 1)
    return _kept(f"calibrate, {num_rows} clean captions, {fpr:g}", exact, false, rates)


def local(source: str, size: int, num_images: int, fpr: float, alike: float = 0.0, seed: int = 0) -> Kept:
    """A local verdict of a clean candidate with `num_images` images.

    Args:
        source: PICTURES (a member of the null is one image) or CAPTIONS (it is a caption with as many images).
        size: of the null.
        num_images: images a candidate.
        fpr: promised a candidate.
        alike: share of candidates whose images are all the same, as those of one caption may be.
    """
    rng = np.random.default_rng(seed)
    rates, false = [], 0
    for _ in range(AUDITS):
        # statistics are uniform in [0, 1] for one image; the smallest of K is 1 - (1 - u)^(1 / K)
        draws = rng.random(size)
        members = draws if source == PICTURES else 1 - (1 - draws) ** (1 / num_images)
        null = Null.of(source, members, fpr, num_images if source == PICTURES else 1)
        images = rng.random(num_images)
        if rng.random() < alike:
            images[:] = images[0]
        called = bool(images.min() < null.threshold)
        p = null.p_value(float(images.min()))
        assert p is not None and called == (p <= fpr + 1e-12)  # the verdict and the p-value agree
        false += called
        one = null.threshold
        rates.append(alike * one + (1 - alike) * -np.expm1(num_images * np.log1p(-one)))
    text = f"local verdict, K = {num_images}, null of {size} {source}, {fpr:g}"
    return _kept(text + (f", {alike:.0%} with equal images" if alike else ""), fpr, false, np.array(rates))


def false_discoveries(
    size: int, clean: int, copied: int, q: float, num_images: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """Share of false ones among candidates with a q-value of at most q, all of one audit judged by one null.

    Returns:
        Its mean over audits, the standard deviation of that mean, and the share of copied candidates called.
    """
    rng = np.random.default_rng(seed)
    shares, found = [], []
    for _ in range(AUDITS):
        null = Null.of(PICTURES, rng.random(size), 0.05, num_images)
        statistics = np.concatenate([rng.random((clean, num_images)).min(1), rng.beta(1, 2000, copied)])
        called = q_values([null.p_value(float(value)) for value in statistics]) <= q
        shares.append(called[:clean].sum() / max(called.sum(), 1))
        found.append(called[clean:].mean() if copied else 0.0)
    return float(np.mean(shares)), float(np.std(shares) / np.sqrt(AUDITS)), float(np.mean(found))


def _kept(what: str, promised: float, false: int, rates: np.ndarray) -> Kept:
    return Kept(what, promised, false, float(rates.mean()), float(rates.std() / np.sqrt(len(rates))))


CALIBRATE = ((20, 0.05), (100, 0.01), (200, 0.05), (1000, 0.01))
LOCAL = (
    *((PICTURES, 1000, 1, 0.05), (PICTURES, 1000, 1, 0.01), (PICTURES, 1000, 4, 0.05), (PICTURES, 1000, 16, 0.05)),
    *((PICTURES, 1592, 16, 0.01), (CAPTIONS, 199, 1, 0.05), (CAPTIONS, 199, 4, 0.05), (CAPTIONS, 199, 16, 0.05)),
)
Q_VALUES = ((1000, 70, 30, 0.05), (1000, 70, 30, 0.1), (1000, 100, 0, 0.05))


def main() -> None:
    print(f"{AUDITS} synthetic audits each; one judgement of something clean an audit")
    cases = [calibrate(*case) for case in CALIBRATE] + [local(*case) for case in LOCAL]
    cases.append(local(PICTURES, 1000, 4, 0.05, alike=0.5))
    for case in cases:
        low, high = case.interval
        print(
            f"{case.what:<72} promised {case.promised:.2%}  realised {case.false / AUDITS:.1%} "
            f"[{low:.1%}, {high:.1%}]  the thresholds' own rates: mean {case.mean_rate:.3%} (s.d. {case.deviation:.3%})"
        )
    for size, clean, copied, q in Q_VALUES:
        mean, deviation, found = false_discoveries(size, clean, copied, q)
        print(
            f"q <= {q:g}, {clean} clean and {copied} copied candidates, null of {size}: false among those called "
            f"{mean:.2%} (s.d. {deviation:.2%}), copied ones called {found:.0%}"
        )


if __name__ == "__main__":
    main()
