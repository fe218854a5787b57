"""A null distribution: what a distance looks like where nothing is copied, the threshold it gives, and p-values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.statistics.thresholds import threshold_at_fpr


@dataclass(frozen=True)
class Null:
    """Distances where nothing is copied, and the threshold they give.

    Attributes:
        distances: one a sampled picture, sorted.
        threshold: below it a distance is a copy: its p-value is at most the per-image false-positive rate.
        low, high: 95 % interval of the quantile at that rate.
        fpr: the rate asked for per candidate; per_image: per image.
        pictures: how many were sampled; near_duplicates: pairs left out as repeats.
    """

    distances: NDArray[np.float64]
    threshold: float
    low: float
    high: float
    fpr: float
    per_image: float
    pictures: int
    near_duplicates: int

    @classmethod
    def of(cls, distances: NDArray[np.float64], fpr: float, num_images: int, near_duplicates: int = 0) -> Null:
        """The null of a sample of distances.

        A candidate has `num_images` chances: the rate per image is 1 - (1 - fpr)^(1 / num_images). Below the threshold
        every p-value is at most that; -inf where so few distances can promise no such rate.
        """
        distances = np.sort(distances)
        per_image = 1 - (1 - fpr) ** (1 / num_images)
        at = threshold_at_fpr(-distances, per_image)
        allowed = math.floor(per_image * (len(distances) + 1) + 1e-9) - 1  # null distances below the threshold
        threshold = float(distances[allowed]) if allowed >= 0 else -math.inf
        return cls(distances, threshold, -at.high, -at.low, fpr, per_image, len(distances), near_duplicates)

    @classmethod
    def given(cls, threshold: float, fpr: float) -> Null:
        """A threshold without a sample: given by a user, or -inf where nothing can be compared."""
        return cls(np.zeros(0), threshold, threshold, threshold, fpr, fpr, 0, 0)

    def p_value(self, distance: float) -> float | None:
        """(1 + distances at or below) / (1 + sample): never zero, as a finite sample can promise no less.

        None without a sample.
        """
        if not len(self.distances):
            return None
        below = int(np.searchsorted(self.distances, distance, side="right"))
        return (1 + below) / (1 + len(self.distances))


@dataclass(frozen=True)
class NullFacts:
    """A Null as it is stored, sealed with the stage whose verdicts rest on it: infinite bounds are null."""

    threshold: float | None
    low: float | None
    high: float | None
    match_fpr: float
    per_image_fpr: float
    pictures: int
    near_duplicates_left_out: int
    distances: list[float]

    @classmethod
    def of(cls, null: Null) -> NullFacts:
        threshold, low, high = (
            float(value) if math.isfinite(value) else None for value in (null.threshold, null.low, null.high)
        )
        distances = [float(value) for value in null.distances]
        rates, counts = (null.fpr, null.per_image), (null.pictures, null.near_duplicates)
        return cls(threshold, low, high, *rates, *counts, distances)

    def null(self) -> Null:
        """The Null that was stored."""
        threshold, low, high = (
            -math.inf if value is None else value for value in (self.threshold, self.low, self.high)
        )
        rates = (self.match_fpr, self.per_image_fpr)
        counts = (self.pictures, self.near_duplicates_left_out)
        return Null(np.array(self.distances, float), threshold, low, high, *rates, *counts)
