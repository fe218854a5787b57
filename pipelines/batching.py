"""Batches that shrink when the accelerator is out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class AdaptiveBatches:
    """Cut rows into batches; on CUDA out of memory halve the batch, go on, and remember it.

    Args:
        batch_size: rows of the first batch, at least 1.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} is below 1")
        self.batch_size = batch_size

    def run(self, rows: int, compute: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """Yield (rows, result) in order until all rows are done.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        start = 0
        while start < rows:
            part = slice(start, min(start + self.batch_size, rows))
            try:
                result = compute(part)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                torch.cuda.empty_cache()
                continue
            yield part, result
            start = part.stop


def one_behind(values: Iterable[Result]) -> Iterator[Result]:
    """The same values, each once the next one is there: what was asked of a device is fetched after the next is."""
    last: list[Result] = []
    for value in values:
        yield from last
        last = [value]
    yield from last
