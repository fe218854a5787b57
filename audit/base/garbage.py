"""How often a process of ours looks for garbage."""

from __future__ import annotations

import gc

ALLOCATIONS = 100_000  # Python's 700 are for small programs: the libraries alone make half a million objects that stay


def look_seldom() -> None:
    """Have Python look for cyclic garbage after more allocations; for processes that are ours alone, before imports."""
    gc.set_threshold(ALLOCATIONS, 20, 100)
