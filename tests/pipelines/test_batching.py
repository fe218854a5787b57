"""Batches that find their size: on a device whose time and memory are known."""

from __future__ import annotations

import pytest
import torch

from pipelines.batching import AdaptiveBatches, half


class Device:
    """Takes as long as 40 rows do for any batch of fewer: more rows a second up to 40; `room` rows fit."""

    def __init__(self, room: int = 10**9, full: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.seconds, self.room, self.full, self.done, self.finished = 0.0, room, full, list[int](), 0

    def clock(self) -> float:
        return self.seconds

    def compute(self, part: slice) -> int:
        if part.stop - part.start > self.room:
            raise self.full("out of memory")
        self.done += range(part.start, part.stop)
        return part.stop - part.start

    def finish(self, rows: int) -> None:
        """A device answers at once, and is done later."""
        self.seconds += max(rows, 40) * 0.001
        self.finished += 1

    def run(self, batches: AdaptiveBatches, rows: int) -> list[int]:
        self.done.clear()
        sizes = [size for _, size in batches.run(rows, self.compute, self.finish)]
        assert self.done == list(range(rows))  # every row once, in order
        return sizes


def test_auto_doubles_while_it_is_faster_and_keeps_the_size() -> None:
    device = Device()
    batches = AdaptiveBatches("auto", device.clock)
    assert device.run(batches, 100) == [16, 16, 16, 32, 20]  # a size is tried three times, whole batches alone count
    assert device.run(batches, 1000)[:9] == [32, 32, 64, 64, 64, 128, 128, 128, 64]  # 128 rows take twice what 64 do
    assert (batches.batch_size, batches.growing) == (64, False)
    before = device.finished
    assert device.run(batches, 640) == [64] * 10
    assert device.finished == before  # a size that is found waits for no batch


@pytest.mark.parametrize("full", [torch.OutOfMemoryError, RuntimeError])  # of CUDA, and of others
def test_auto_stays_with_what_fits(full: type[RuntimeError]) -> None:
    device = Device(33, full)
    batches = AdaptiveBatches("auto", device.clock)
    assert device.run(batches, 300) == [16, 16, 16, *[32] * 7, 28]
    assert (batches.batch_size, batches.growing) == (32, False)


def test_what_fails_at_any_size_is_raised() -> None:
    with pytest.raises(RuntimeError):
        Device(room=8, full=RuntimeError).run(AdaptiveBatches("auto"), 100)  # before it has grown
    with pytest.raises(RuntimeError):
        Device(room=8, full=RuntimeError).run(AdaptiveBatches(32), 100)
    assert Device(room=8).run(AdaptiveBatches(32), 20) == [8, 8, 4]


def test_a_number_stays_and_no_batch_is_waited_for() -> None:
    device = Device()
    assert device.run(AdaptiveBatches(24, device.clock), 60) == [24, 24, 12] and device.finished == 0
    with pytest.raises(ValueError, match="below 1"):
        AdaptiveBatches(0)
    assert (half("auto"), half(32), half(1)) == ("auto", 16, 1)
