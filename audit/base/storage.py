"""A folder anywhere fsspec reaches, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from audit.base.errors import AuditError, StorageError


def _host() -> str:
    """Where a process number means something: the host, and its container, which may share the host's name."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def join(*parts: str) -> str:
    """Join path parts with single slashes, keeping a URL's scheme."""
    return "/".join([parts[0].rstrip("/"), *(part.strip("/") for part in parts[1:] if part)])


def list_tree(fs: Any, root: str) -> dict[str, int]:
    """Every file below a folder (or the file itself) with its size, sorted by path.

    Locally links to folders are followed, as fsspec's `find` does not; no folder is entered twice.
    """
    if not isinstance(fs, LocalFileSystem) or os.path.isfile(root):
        found = fs.find(root, detail=True)
        return {path: int(info["size"] or 0) for path, info in sorted(found.items())}
    files, entered = {}, {os.path.realpath(root)}

    def is_new(folder: str) -> bool:
        real = os.path.realpath(folder)
        return real not in entered and not entered.add(real)  # type: ignore[func-returns-value]

    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in sorted(below) if is_new(os.path.join(folder, name))]
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isfile(path):  # and no link to nowhere
                files[path] = os.path.getsize(path)
    return dict(sorted(files.items()))


class Folder:
    """One folder by path or URL (local, s3://, gs://, memory://); names are relative to it, with forward slashes.

    Args:
        url: the folder; it need not exist.

    Raises:
        AuditError: a URL scheme fsspec has no driver for.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = os.fspath(url)
        try:
            fs, root = fsspec.core.url_to_fs(text)
        except (ImportError, ValueError) as error:
            raise AuditError(f"{text}: cannot open this kind of location: {error}") from error
        self.fs: Any = fs
        self.root: str = root.rstrip("/") or "/"
        self.url: str = text.rstrip("/") or "/"
        self.local: bool = isinstance(fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def path(self, name: str = "") -> str:
        """The file system's own path of `name`."""
        return join(self.root, name) if name else self.root

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes in `name`. Raises FileNotFoundError."""
        return int(self.fs.size(self.path(name)))

    def open(self, name: str) -> IO[bytes]:
        """Open for reading, seekable."""
        return self.fs.open(self.path(name), "rb")

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(name)))

    def list(self, name: str = "") -> list[str]:
        """Names directly below a subfolder, sorted; [] when it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def remove(self, name: str) -> None:
        """Remove a file or a subtree; no error when it is not there. Raises AuditError where it may not be removed."""
        try:
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)
        except OSError as error:
            raise AuditError(f"{self.path(name)}: cannot be removed: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        Locally: temporary sibling, flush, fsync, rename, fsync of the folder. Object stores: one upload to the final
        key, which becomes visible when it is complete; a rename there would be a copy and a delete.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.path(name)
        if not self.local:
            try:
                self.fs.pipe_file(target, data)
            except Exception as error:  # every driver has its own types
                raise StorageError(f"{target}: cannot be written: {error}") from error
            self.fs.invalidate_cache()
            return
        temporary = self._temporary(target)
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._publish(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may lie below what is no folder
                os.unlink(temporary)
            raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error

    def put(self, name: str, source: str | os.PathLike[str]) -> None:
        """Publish a large local file under `name`, as `write` does with bytes; `source` is left in place."""
        target = self.path(name)
        if not self.local:
            self.fs.put_file(os.fspath(source), target)
            self.fs.invalidate_cache()
            return
        temporary = self._temporary(target)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as reader, open(temporary, "wb") as file:
            while chunk := reader.read(1 << 24):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        self._publish(temporary, target)

    def sweep(self) -> None:
        """Remove temporary files that dead processes of this host left behind."""
        if not self.local or not self.exists():
            return
        host = _host()
        for file in Path(self.root).rglob(f".*.{host}.*.tmp"):
            pid = file.name.rsplit(".", 2)[-2]
            if pid.isdigit() and not _alive(int(pid)):
                file.unlink(missing_ok=True)

    @staticmethod
    def _temporary(target: str) -> str:
        path = Path(target)
        return str(path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp"))

    @staticmethod
    def _publish(temporary: str, target: str) -> None:
        os.replace(temporary, target)
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
