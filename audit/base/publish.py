"""A file of a local disk appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shutil
import socket
import uuid
from pathlib import Path
from typing import IO

from audit.base.errors import StorageError

CREATE_LOCK = ".create.lock"
"""Beside what is created where there are no hard links."""
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}


def publish(target: str, data: bytes | Path, new: bool = False) -> None:
    """Write a temporary sibling whole, then give it its name, and sync both to the disk.

    Args:
        target: path of the file. data: what it holds, or the file to copy. new: not over a file that is there.

    Raises:
        FileExistsError: it is there and has to be new. StorageError: the folder cannot be written.
    """
    path = Path(target)
    temporary = str(path.with_name(f".{path.name}.{this_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"))
    try:
        with _create(temporary) as file:
            if isinstance(data, Path):
                with data.open("rb") as reader:
                    shutil.copyfileobj(reader, file, 1 << 24)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (_link if new else os.replace)(temporary, target)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may lie below what is no folder
            os.unlink(temporary)
        if not isinstance(error, OSError) or isinstance(error, FileExistsError):
            raise
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error


def sweep(root: str) -> None:
    """Remove temporary files below a folder that dead processes of this host left behind."""
    host = this_host()
    for place, _, names in os.walk(root):  # which bears with folders that go meanwhile
        for name in fnmatch.filter(names, f".*.{host}.*.tmp"):
            pid = name.rsplit(".", 3)[-3]
            if pid.isdigit() and not _alive(int(pid)):
                Path(place, name).unlink(missing_ok=True)


def this_host() -> str:
    """Where a process number means something: the host, and its container, which may share the host's name."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def lives_here(host: str, pid: int) -> bool | None:
    """Whether a process that wrote down `this_host()` and its number lives; None where another host knows."""
    return _alive(pid) if host == this_host() else None


def _create(path: str, tries: int = 10) -> IO[bytes]:
    """Open a new file; its folder is made, again where another process has just removed it (a claim's last holder)."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")
    except (FileExistsError, FileNotFoundError) as error:
        folder = os.path.dirname(path)
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder should be") from error
        if tries == 1:
            raise
        return _create(path, tries - 1)


def _link(temporary: str, target: str) -> None:
    """Give a file its name unless the name is taken; where a file system has no hard links, under a lock instead."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    else:
        os.unlink(temporary)
        return
    from filelock import FileLock  # takes a while to import, and is hardly ever needed

    try:
        with FileLock(os.path.join(os.path.dirname(target), CREATE_LOCK)):
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "is there", target)
            os.replace(temporary, target)
    except NotImplementedError as error:  # of filelock 3, all there is for Python 3.10; 4 makes a soft lock by itself
        raise OSError(errno.ENOSYS, "the file system has neither hard links nor file locks") from error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
