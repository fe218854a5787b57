"""A sample of a run's distinct captions that depends on the captions alone: those with the lowest hashes."""

from __future__ import annotations

import numpy as np

SAMPLE = 512
"""Captions a run's null maps are made of (docs/detection.md), all of them where a run has fewer."""


class LowestHashes:
    """The `count` lowest distinct hashes of those added: the same captions whatever their order.

    Attributes:
        rows: the first row of each, lowest hash first, int64 [at most count].
    """

    def __init__(self, count: int = SAMPLE) -> None:
        self.count = count
        self.rows = np.zeros(0, np.int64)
        self._lowest = np.zeros(0, np.uint64)

    def add(self, start: int, hashes: np.ndarray) -> None:
        """Hashes of the rows from `start` on (uint64; 0 is no caption), after those added before."""
        able = hashes != 0
        if len(self._lowest) == self.count:
            able &= hashes < self._lowest[-1]
        found = np.flatnonzero(able)
        lowest, first = np.unique(np.concatenate([self._lowest, hashes[found]]), return_index=True)
        rows = np.concatenate([self.rows, start + found])[first]
        self._lowest, self.rows = lowest[: self.count], rows[: self.count]
