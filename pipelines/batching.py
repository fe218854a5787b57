"""Batches that shrink when the accelerator is out of memory, and grow while that is faster where asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, TypeVar

import torch

Result = TypeVar("Result")
AUTO: Final = "auto"
BatchSize = int | Literal["auto"]
FIRST, LARGEST, TRIES, FASTER = 16, 512, 3, 1.05  # rows; batches of a size; how much faster twice as many must be


class AdaptiveBatches:
    """Cut rows into batches; on CUDA out of memory halve the batch, go on, and remember it.

    With `auto` batches begin with 16 rows and double as long as that makes at least 5 % more rows a second (the best of
    three batches of a size), memory lasts, and there are as many rows: then the size stays, for later calls too. A size
    that has just been doubled and fails, however the device says so, is halved again.

    Args:
        batch_size: rows of the first batch, at least 1, or `auto`.
        clock: in seconds.
    """

    def __init__(self, batch_size: BatchSize, clock: Callable[[], float] = time.perf_counter) -> None:
        if batch_size != AUTO and batch_size < 1:
            raise ValueError(f"batch size {batch_size} is below 1")
        self.growing = batch_size == AUTO
        self.batch_size: int = FIRST if batch_size == AUTO else batch_size
        self._clock, self._rates, self._fastest = clock, list[float](), 0.0

    def run(
        self, rows: int, compute: Callable[[slice], Result], finish: Callable[[Result], object] = lambda result: None
    ) -> Iterator[tuple[slice, Result]]:
        """Yield (rows, result) in order until all rows are done.

        Args:
            finish: returns once the device is done with a result; called while a size is being found alone.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        start = 0
        while start < rows:
            part = slice(start, min(start + self.batch_size, rows))
            began = self._clock()
            try:
                result = compute(part)
                if self.growing:
                    finish(result)
            except RuntimeError as error:  # mps and cpu have no type of their own for too little memory
                grown = self.growing and self.batch_size > FIRST
                if self.batch_size == 1 or not (grown or isinstance(error, torch.OutOfMemoryError)):
                    raise
                self.batch_size, self.growing = max(1, self.batch_size // 2), False
                torch.cuda.empty_cache()
                continue
            if self.growing and part.stop - start == self.batch_size:
                self._took(self._clock() - began)
            yield part, result
            start = part.stop

    def _took(self, seconds: float) -> None:
        self._rates.append(self.batch_size / max(seconds, 1e-9))
        if len(self._rates) < TRIES:
            return
        rate, self._rates = max(self._rates), []
        if rate < FASTER * self._fastest:
            self.batch_size, self.growing = self.batch_size // 2, False
        elif 2 * self.batch_size > LARGEST:
            self.growing = False
        else:
            self._fastest, self.batch_size = rate, 2 * self.batch_size


def half(batch_size: BatchSize) -> BatchSize:
    """Of rows that are two latents each."""
    return batch_size if batch_size == AUTO else max(1, batch_size // 2)


def one_behind(values: Iterable[Result]) -> Iterator[Result]:
    """The same values, each once the next one is there: what was asked of a device is fetched after the next is."""
    last: list[Result] = []
    for value in values:
        yield from last
        last = [value]
    yield from last
