"""A sample of a run's distinct captions that depends on the captions alone: those with the lowest hashes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SAMPLE = 512
"""Captions a run's null maps are made of (docs/detection.md), all of them where a run has fewer."""


def lowest_hashes(blocks: Iterable[tuple[int, np.ndarray]], count: int = SAMPLE) -> np.ndarray:
    """First rows of the `count` lowest distinct hashes, lowest first: the same captions whatever their order.

    Args:
        blocks: number of the first row and hashes of the rows from there on (uint64; 0 is no caption), in row order.
        count: how many, at most.
    Returns:
        rows, int64 [at most count].
    """
    lowest, rows = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for start, hashes in blocks:
        able = hashes != 0
        if len(lowest) == count:
            able &= hashes < lowest[-1]
        found = np.flatnonzero(able)
        lowest, first = np.unique(np.concatenate([lowest, hashes[found]]), return_index=True)
        rows = np.concatenate([rows, start + found])[first]
        lowest, rows = lowest[:count], rows[:count]
    return rows
