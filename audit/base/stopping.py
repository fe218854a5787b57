"""SIGTERM and Ctrl-C: the first asks the job to stop after dropping the shard in hand, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from audit.base.errors import Drained


class Stop:
    """Whether somebody asked the job to stop."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raises Drained when a stop was asked for."""
        if self.requested:
            raise Drained


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside the block, the first SIGTERM or SIGINT sets the flag and the second raises KeyboardInterrupt.

    Signals can only be caught in the main thread; elsewhere the block changes nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("Stopping after the batch in hand; once more stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
