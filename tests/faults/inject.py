"""Faults put into a command's own process: it dies or fails at the n-th thing it does to the disk or to a store.

The environment variable FAULT says which: `KIND:N`, KIND one of
- kill: SIGKILL just before the n-th write, rename, link or sync; stop: SIGSTOP there.
- full, inodes, readonly: from the n-th on every write, of files or to the store, fails with ENOSPC, EDQUOT, EROFS.
- store: the n-th call of the store fails as a lost connection; lost: from the n-th on every one does.
- lie: the n-th write to the store says that it was done, and was not.
LINKS=none: the disk has no hard links, as exFAT and some network drives.
The store is `faulty://PATH`: a local folder behind a file system that is no local one to the program.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

_calls = {"disk": 0, "store": 0}
_NUMBERS = {"full": errno.ENOSPC, "inodes": errno.EDQUOT, "readonly": errno.EROFS}


def _fault() -> tuple[str, int]:
    kind, _, number = os.environ.get("FAULT", ":0").partition(":")
    return kind, int(number or 0)


def before_write() -> None:
    """Called before every write, rename, link or sync."""
    _calls["disk"] += 1
    kind, number = _fault()
    if kind in ("kill", "stop") and _calls["disk"] == number:
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind in _NUMBERS and _calls["disk"] >= number:
        raise OSError(_NUMBERS[kind], os.strerror(_NUMBERS[kind]))


def _before_call() -> None:
    _calls["store"] += 1
    kind, number = _fault()
    if (kind == "store" and _calls["store"] == number) or (kind == "lost" and _calls["store"] >= number):
        raise ConnectionResetError("the store has closed the connection")


def install() -> None:
    """Watch what this process does to the disk. Python's own open() writes are seen at the sync that follows."""
    for name in ("replace", "link", "fsync"):
        call = _no_link if (name, os.environ.get("LINKS")) == ("link", "none") else getattr(os, name)
        setattr(os, name, _watched(call))


def _no_link(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*arguments: Any, **named: Any) -> Any:
        before_write()
        return call(*arguments, **named)

    return watched


class FaultyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store: whole objects by key, conditional puts, no rename, and calls that can fail or lie."""

    protocol = "faulty"
    cachable = False
    root_marker = "/"

    def _facts(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        return {"name": str(path), "type": kind, "size": path.stat().st_size if kind == "file" else 0}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        _before_call()
        return self._facts(Path(self._strip_protocol(path)))

    def ls(self, path: str, detail: bool = False, **_: Any) -> Any:
        _before_call()
        place = Path(self._strip_protocol(path))
        there = sorted(place.iterdir()) if place.is_dir() else [place]
        found = [self._facts(each) for each in there if not each.name.startswith(".tmp")]
        return found if detail else [each["name"] for each in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        _before_call()
        return Path(self._strip_protocol(path)).read_bytes()[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        _before_call()
        return open(self._strip_protocol(path), mode)

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        _before_call()
        place = Path(self._strip_protocol(path))
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        _before_call()
        before_write()
        if _fault() == ("lie", _calls["store"]):
            return
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp.{target.name}.{os.getpid()}")
        temporary.write_bytes(value)
        try:
            if mode == "create":
                _link(temporary, target)
            else:
                _replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


_link, _replace = os.link, os.replace  # as they were before `install`
fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
