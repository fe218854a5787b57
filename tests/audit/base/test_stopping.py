"""Ctrl-C is what it is, whatever a library makes of it."""

from __future__ import annotations

import os
import signal

import pytest

from audit.base.errors import AuditError, Drained
from audit.base.stopping import stop_on_signals


def send(count: int) -> None:
    for _ in range(count):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_second_is_no_error_of_the_library_it_was_caught_in() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        try:
            send(2)
        except KeyboardInterrupt as error:
            raise AuditError("weights cannot be read") from error
    assert stop.requested and signal.getsignal(signal.SIGINT) is before


def test_the_first_leaves_errors_as_they_are_and_asks_to_stop() -> None:
    with pytest.raises(AuditError, match="a mistake"), stop_on_signals():
        send(1)
        raise AuditError("a mistake")
    with pytest.raises(Drained), stop_on_signals() as stop:
        send(1)
        stop.check()
