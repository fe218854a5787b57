"""SIGTERM and Ctrl-C: the first asks the job to stop after dropping the shard in hand, the second stops at once.

Both act whatever the job is doing. Python runs its handlers between two of its own instructions, and a call that hangs
in a driver or a store has none: so a thread hears of every signal through a pipe, and where the second one has not
ended the process after GRACE seconds, the thread does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from audit.base.errors import Drained

GRACE = 5.0  # seconds after the second signal
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether somebody asked the job to stop.

    Attributes:
        requested: he did. insisted: twice. children: owned processes, killed where this one has to end at once.
    """

    def __init__(self) -> None:
        self.requested = self.insisted = False
        self.children: set[subprocess.Popen[bytes]] = set()

    def check(self) -> None:
        """Raises Drained when a stop was asked for."""
        if self.requested:
            raise Drained


@contextmanager
def stop_on_signals(aloud: bool = True) -> Iterator[Stop]:
    """Inside the block, the first SIGTERM or SIGINT sets the flag and says so; the second raises KeyboardInterrupt.

    Signals can only be caught in the main thread; elsewhere the block changes nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            stop.insisted = True
            raise KeyboardInterrupt
        stop.requested = True
        if not aloud:
            return
        with contextlib.suppress(OSError, ValueError):  # a closed terminal is no reason not to stop
            print("Stopping after the batch in hand; once more stops at once.", file=sys.stderr)

    with _end_at_the_second(stop):
        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield stop
        except Exception as error:
            if stop.insisted:  # a library may make an error of its own of it, as safetensors does
                raise KeyboardInterrupt from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _end_at_the_second(stop: Stop) -> Iterator[None]:
    heard, told = os.pipe()
    os.set_blocking(told, False)
    over = threading.Event()

    def listen() -> None:
        count = 0
        while count < 2:
            data = os.read(heard, 64)
            if not data:
                return
            count += sum(number in SIGNALS for number in data)
        if not over.wait(GRACE):
            for child in list(stop.children):
                child.kill()
            os._exit(130)

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(told)  # ends the thread
        thread.join()
        os.close(heard)
