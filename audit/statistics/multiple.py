"""Many tests at once: how many of those called are expected to be false."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def q_values(p_values: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini-Hochberg q-values: of all tests whose q is at most q, a share of at most q is expected to be false.

    With m p-values in rising order, q_(i) = min over j >= i of m p_(j) / j (Benjamini and Hochberg 1995). Holds for
    independent p-values and for positively dependent ones (Benjamini and Yekutieli 2001); those of one null sample are.

    Args:
        p_values: [n]; None or NaN is no test and counts nowhere.
    Returns:
        [n], NaN where there is no p-value.

    >>> q_values([0.01, 0.04, None, 0.03]).tolist()
    [0.03, 0.04, nan, 0.04]
    """
    from scipy.stats import false_discovery_control  # type: ignore[import-untyped]

    values = np.array([np.nan if value is None else value for value in p_values], np.float64)
    known = ~np.isnan(values)
    if known.any():
        values[known] = false_discovery_control(values[known], method="bh")
    return values


def expected_false(q_values: NDArray[np.float64], called: NDArray[np.bool_]) -> float:
    """How many of the called tests are expected to be false, at most.

    With q the largest q-value among them: q times the number of tests, called or not, with at most that q.

    >>> expected_false(np.array([0.01, 0.05, 0.02, 0.9]), np.array([True, True, False, False]))
    0.15000000000000002
    """
    ours = q_values[called & ~np.isnan(q_values)]
    return float(ours.max() * (q_values <= ours.max()).sum()) if len(ours) else 0.0
