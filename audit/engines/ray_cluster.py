"""Join a Ray cluster within a bounded time, and notice when it is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from audit.base.errors import AuditError

CONNECT, LOST = 30.0, 20.0  # seconds that a head may be silent before it is refused; before it is given up
ASK = 2.0  # seconds between two looks at the head
SETTINGS = 4  # type of an HTTP/2 frame
_commands = 0  # how many of `one_connection` are running
_made_here = False  # whether the connection there is was made by `connected`


@contextlib.contextmanager
def one_connection() -> Iterator[None]:
    """Decorates a command of several stages: a connection that one of them made stays for the next ones."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1
        ray = sys.modules.get("ray")
        if not _commands and ray is not None and _made_here:
            _disconnect(ray)


def _disconnect(ray: Any) -> None:
    global _made_here
    _made_here = False
    ray.shutdown()


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Inside the block the module `ray` is connected: to `address`, RAY_ADDRESS, or a cluster of this machine alone.

    A connection that was there before stays.

    Raises:
        AuditError: Ray is not installed, or nothing answers as a Ray head within about CONNECT seconds.
    """
    global _made_here
    try:
        import ray
    except ImportError as error:
        raise AuditError("--engine ray: Ray is not installed: pip install 'be-audit[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    source = "--ray-address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    greeted = False
    try:
        if address and ":" in address:  # not `auto` or `local`
            _wait_for(address.removeprefix("ray://"))
            greeted = True
        # "local", or Ray joins the last cluster that was started on this machine, dead or alive
        more: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **more)
        _made_here = True
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise
        first = (str(error).splitlines() or [""])[0]
        token = "; one that asks for a token is joined with RAY_AUTH_MODE=token" if greeted else ""
        raise AuditError(f"{source} {address}: no Ray cluster answers there: {first}{token}") from error
    try:
        yield ray
    finally:
        if not _commands:
            _disconnect(ray)


class Head:
    """The node that keeps a cluster together. Ray itself ends the driver's process when it is gone for a minute."""

    def __init__(self, ray: Any) -> None:
        self.address: str = ray.get_runtime_context().gcs_address
        self.asked = 0.0
        self.heard: float | None = None  # stays None where it cannot be reached from here, as through ray://

    def lost(self) -> bool:
        """Whether it has answered once, and then not for LOST seconds."""
        now = time.monotonic()
        if now - self.asked > ASK:
            self.asked = now
            with contextlib.suppress(OSError, ValueError):
                _greet(self.address, ASK)
                self.heard = time.monotonic()
        return self.heard is not None and now - self.heard > LOST


def _wait_for(address: str) -> None:
    """Until a server greets there.

    Raises:
        OSError: not within CONNECT seconds. ValueError: no HOST:PORT.
    """
    deadline = time.monotonic() + CONNECT
    while True:
        try:
            _greet(address, CONNECT)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _greet(address: str, seconds: float) -> None:
    """Exchange the first frames of HTTP/2 (RFC 9113, 3.4), which Ray's servers speak: a port alone may be anybody's.

    Ray's own attempt to join lasts minutes where something listens and does not answer.

    Raises:
        OSError: nobody answers, or not with HTTP/2. ValueError: no HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as server:
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, SETTINGS, 0, 0, 0, 0, 0)))
        if server.recv(9)[3:4] != bytes((SETTINGS,)):
            raise OSError("what listens there is no Ray head")
