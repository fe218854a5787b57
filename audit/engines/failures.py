"""Rows that fail: a bad one costs itself alone, and a shard with too many is not committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from audit.base.errors import AuditError, Drained

Row = TypeVar("Row")
Result = TypeVar("Result")


class ShardFailed(Exception):
    """A shard was computed but may not be committed (too many failed rows)."""


def together_or_alone(rows: Sequence[Row], compute: Callable[[Sequence[Row]], Sequence[Result]]) -> list[Result | str]:
    """Compute rows all together; when that fails, one by one, so that a bad one costs itself alone.

    Args:
        rows: N rows. compute: some of them to as many results; raises when one of them cannot be computed.
    Returns:
        N results, or why a row has none.
    Raises:
        AuditError, Drained: they are the job's, not a row's.
    """
    if not rows:
        return []
    try:
        return list(compute(rows))
    except (AuditError, Drained):
        raise
    except Exception:  # which row it was shows below
        found: list[Result | str] = []
        for row in rows:
            try:
                found += compute([row])
            except (AuditError, Drained):
                raise
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}"[:500])
        return found


def check_failures(errors: Sequence[str], rows: int, rate: float, what: str) -> None:
    """Refuse to commit a shard with more failed rows than the rate allows; one is allowed whatever the size.

    Without the one, a caption that always fails would keep a shard of few distinct captions from ever being done.

    Args:
        errors: why rows failed. rows: of the shard. rate: share that may fail; 0 allows none. what: rows' name, plural.

    Raises:
        ShardFailed: too many.
    """
    if len(errors) > (max(rate * rows, 1.0) if rate else 0.0):
        raise ShardFailed(f"{len(errors)} of {rows} {what} failed, the first: {errors[0]}")
