"""A null distribution: what a measure looks like where nothing is copied, the threshold it gives, and p-values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.statistics.thresholds import rows_needed, threshold_at_fpr, true_rate

GIVEN, PICTURES, CAPTIONS = "given", "pictures", "captions"
"""Where a null comes from: a threshold somebody gave; different training pictures; images of clean captions."""


def draw_rate(fpr: float, draws: int) -> float:
    """The rate of each of several independent draws that together have the rate `fpr`: 1 - (1 - fpr)^(1 / draws).

    >>> round(draw_rate(0.01, 16), 6)
    0.000628
    """
    return -math.expm1(math.log1p(-fpr) / draws)


def sample_needed(fpr: float, draws: int) -> int:
    """Size of a null without which no threshold keeps the rate.

    >>> sample_needed(0.01, 1), sample_needed(0.01, 16)
    (99, 1592)
    """
    return rows_needed(draw_rate(fpr, draws))


@dataclass(frozen=True)
class Null:
    """Statistics where nothing is copied, and the threshold they give; the smaller, the more alike.

    Attributes:
        source: GIVEN, PICTURES or CAPTIONS.
        statistics: one a sampled picture or caption, sorted; empty where the threshold was given.
        threshold: a statistic below it is a copy; -inf where nothing can be told.
        low, high: 95 % interval of the true quantile it estimates.
        fpr: the false-positive rate a candidate asked for.
        draws: members of the null that a candidate has the chances of: its images where a member is one picture, 1
            where a member is a caption with as many images.
        near_duplicates: pairs left out as repeats.
        copies: members that are global copies of a training picture (sscd > 0.5); 0 of PICTURES, which leave them out.
        missing: ids of training pictures that could not be read: members that need one are left out until it is back.
        why_missing: the first reason.
    """

    source: str
    statistics: NDArray[np.float64]
    threshold: float
    low: float
    high: float
    fpr: float
    draws: int = 1
    near_duplicates: int = 0
    copies: int = 0
    missing: tuple[int, ...] = ()
    why_missing: str = ""

    @classmethod
    def of(
        cls,
        source: str,
        statistics: NDArray[np.float64],
        fpr: float,
        draws: int = 1,
        near_duplicates: int = 0,
        copies: int = 0,
    ) -> Null:
        """The null of a sample. Raises AuditError where it is too small for the rate.

        Each of the draws has the rate `draw_rate`; below the threshold of that rate a candidate's p-value is at most
        `fpr`.
        """
        needed = sample_needed(fpr, draws)
        if len(statistics) < needed:
            raise AuditError(f"a null of {len(statistics)} cannot tell a rate of {fpr:g}: {needed} are needed")
        at = threshold_at_fpr(-statistics, draw_rate(fpr, draws))
        ordered, threshold, low, high = np.sort(statistics), -at.threshold, -at.high, -at.low
        return cls(source, ordered, threshold, low, high, fpr, draws, near_duplicates, copies)

    @classmethod
    def given(cls, threshold: float, fpr: float) -> Null:
        """A threshold without a sample: given by a user, or -inf where nothing can be compared."""
        return cls(GIVEN, np.zeros(0), threshold, threshold, threshold, fpr)

    def without(self, missing: Iterable[int], why: str) -> Null:
        """The same, made without what needs these pictures."""
        return replace(self, missing=tuple(sorted(missing)), why_missing=why)

    def __len__(self) -> int:
        """Members of the sample."""
        return len(self.statistics)

    @property
    def untold(self) -> str:
        """Why there is no threshold yet, though there will be one when pictures are back; empty where there is."""
        return "" if len(self) else self.why_missing

    @property
    def rate(self) -> tuple[float, float]:
        """95 % interval of the true false-positive rate a candidate, given the size of the sample; (0, 1) without."""
        if not len(self):
            return 0.0, 1.0
        low, high = (-math.expm1(self.draws * math.log1p(-r)) for r in true_rate(len(self), self._draw_rate))
        return low, high

    @property
    def _draw_rate(self) -> float:
        return draw_rate(self.fpr, self.draws)

    def p_value(self, statistic: float | None) -> float | None:
        """A candidate's p-value from the smallest statistic over all its images and comparisons.

        1 - (1 - p)^draws with p = (1 + members at or below) / (1 + members): never zero, as a finite sample can promise
        no less. None without a sample or a statistic.
        """
        if not len(self) or statistic is None:
            return None
        below = int(np.searchsorted(self.statistics, statistic, side="right"))
        if below == len(self):
            return 1.0
        return -math.expm1(self.draws * math.log1p(-(1 + below) / (1 + len(self))))


@dataclass(frozen=True)
class NullFacts:
    """A Null as it is stored, sealed with the stage whose verdicts rest on it: infinite bounds are null."""

    source: str
    threshold: float | None
    low: float | None
    high: float | None
    match_fpr: float
    draws: int
    near_duplicates_left_out: int
    copies: int
    statistics: list[float]
    missing: list[int] = field(default_factory=list)
    why_missing: str = ""

    @classmethod
    def of(cls, null: Null) -> NullFacts:
        threshold, low, high = (
            float(value) if math.isfinite(value) else None for value in (null.threshold, null.low, null.high)
        )
        return cls(
            source=null.source,
            threshold=threshold,
            low=low,
            high=high,
            match_fpr=null.fpr,
            draws=null.draws,
            near_duplicates_left_out=null.near_duplicates,
            copies=null.copies,
            statistics=[float(value) for value in null.statistics],
            missing=list(null.missing),
            why_missing=null.why_missing,
        )

    def null(self) -> Null:
        """The Null that was stored."""
        threshold, low, high = (
            -math.inf if value is None else value for value in (self.threshold, self.low, self.high)
        )
        return Null(
            source=self.source,
            statistics=np.array(self.statistics, float),
            threshold=threshold,
            low=low,
            high=high,
            fpr=self.match_fpr,
            draws=self.draws,
            near_duplicates=self.near_duplicates_left_out,
            copies=self.copies,
            missing=tuple(self.missing),
            why_missing=self.why_missing,
        )
