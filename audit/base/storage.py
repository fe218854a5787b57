"""A folder anywhere fsspec reaches, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from audit.base.errors import AuditError, StorageError
from audit.base.listings import read_quickly
from audit.base.publish import publish, sweep


def join(*parts: str) -> str:
    """Join path parts with single slashes, keeping a URL's scheme."""
    return "/".join([parts[0].rstrip("/"), *(part.strip("/") for part in parts[1:] if part)])


def is_saved_dataset(fs: Any, folder: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder: by what its files say, others may be called so too."""
    for name, key in (("dataset_dict.json", "splits"), ("state.json", "_data_files")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(fs.cat_file(f"{folder.rstrip('/')}/{name}"))
            if isinstance(content, dict) and key in content:
                return True
    return False


_SECRET = re.compile(
    r"pass|secret|token|signature|credential|api_?key|access_?key|auth(?!ors?$)|^sig$|^pwd$", re.IGNORECASE
)


def check_name(text: str) -> str:
    """The path or URL itself.

    Raises:
        AuditError: its name is not UTF-8, which no table and no page could say; or it holds a password or a token,
            which would be written into run.json, logs and reports.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode(errors="surrogateescape").decode(errors="replace")
        raise AuditError(f"{shown}: the name is not UTF-8: rename it") from error
    for part in text.split("::") if "://" in text else ():
        host, _, query = part.partition("://")[2].partition("?")
        names = [each.partition("=")[0] for each in query.split("&")]
        secret = next((name for name in names if _SECRET.search(name)), None)
        if secret is not None or ":" in host.partition("/")[0].rpartition("@")[0]:
            shown = f"{part.partition('://')[0]}://{host.partition('/')[0].rpartition('@')[2]}/..."
            raise AuditError(
                f"{shown}: the URL holds {secret or 'a password'}, which would be kept with the run: leave it out and "
                "give it to the store's driver (environment variables, ~/.aws, ~/.config/fsspec, ~/.netrc)"
            )
    return text


@contextlib.contextmanager
def _asking(path: str, what: str) -> Iterator[None]:
    """Bring what a driver raises to FileNotFoundError or a StorageError of one line: each driver has its own types."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except (AuditError, MemoryError):
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be {what}: {error.strerror or _first_line(error)}") from error
    except Exception as error:
        raise StorageError(f"{path}: cannot be {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class Entry(NamedTuple):
    """A file as a listing shows it.

    Attributes:
        size: bytes; -1 of a link to nothing.
        stamp: another one once the file is written again; "" where the store has none, or it would not tell yet.
    """

    name: str
    size: int
    stamp: str


YOUNG = 3_000_000_000  # nanoseconds: a file changed since may be changed again within one tick of its clock
AT_ONCE = 16  # questions to an object store side by side


class Folder:
    """One folder by path or URL (local, s3://, gs://, memory://); names are relative to it, with forward slashes.

    Args:
        url: the folder; it need not exist.

    Every method that reads raises FileNotFoundError for what is not there and StorageError for a store that fails.

    Raises:
        AuditError: a URL scheme fsspec has no driver for, a chained URL (`x::y`), or a name that is not UTF-8.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = check_name(os.fspath(url))
        if "::" in text:
            raise AuditError(f"{text}: chained URLs (`::`) cannot be written to: name a plain path or URL")
        try:
            fs, root = fsspec.core.url_to_fs(text)
        except (ImportError, ValueError, OSError) as error:
            raise AuditError(f"{text}: cannot open this kind of location: {error}") from error
        self.fs: Any = fs
        self.root: str = root.rstrip("/") or "/"
        self.url: str = text.rstrip("/") or "/"
        self.local: bool = isinstance(fs, LocalFileSystem)
        # s3fs asks for the size first where it may read parts side by side: two requests for the smallest file
        whole = "max_concurrency" in _parameters_of(fs, "_cat_file")
        self._one_request: dict[str, int] = {"max_concurrency": 1} if whole else {}

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def path(self, name: str = "") -> str:
        """The file system's own path of `name`."""
        return join(self.root, name) if name else self.root

    def exists(self, name: str = "") -> bool:
        with _asking(self.path(name), "read"):
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes in `name`."""
        with _asking(self.path(name), "read"):
            return int(self.fs.size(self.path(name)))

    def open(self, name: str) -> IO[bytes]:
        """Open for reading, seekable."""
        with _asking(self.path(name), "opened"):
            return self.fs.open(self.path(name), "rb")

    def read(self, name: str) -> bytes:
        """The whole file."""
        with _asking(self.path(name), "read"):
            if self.local:
                with open(self.path(name), "rb") as file:  # fsspec's own way takes twice as long as the rest
                    return file.read()
            return bytes(self.fs.cat_file(self.path(name), **self._one_request))

    def list(self, name: str = "") -> list[str]:
        """Names directly below a subfolder, sorted; [] when it does not exist."""
        try:
            with _asking(self.path(name), "listed"):
                self.fs.invalidate_cache()
                found = self.fs.ls(self.path(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def entries(self, name: str, numbered: bool = False) -> Iterator[Entry]:
        """What lies directly below a subfolder, in no order; nothing when it does not exist.

        Args:
            numbered: there are many, only names that begin with two digits are wanted: stores are asked for a hundred
                parts of them side by side.
        """
        try:
            with _asking(self.path(name), "listed"):
                if self.local:
                    yield from _scan_folder(self.path(name))
                else:
                    yield from self._entries_of_store(self.path(name), numbered)
        except FileNotFoundError:
            return

    def _entries_of_store(self, path: str, numbered: bool) -> Iterator[Entry]:
        by_prefix = numbered and "prefix" in (_parameters_of(self.fs, "_find") or _parameters_of(self.fs, "find"))

        def ask(prefix: str) -> list[Entry]:
            found = self.fs.find(path, detail=True, prefix=prefix).values()
            return [_entry_of(each) for each in found]

        self.fs.invalidate_cache()
        read_quickly(self.fs)
        if by_prefix:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for part in pool.map(ask, [f"{number:02d}" for number in range(100)]):
                    yield from part
        else:
            yield from map(_entry_of, self.fs.ls(path, detail=True))
        self.fs.invalidate_cache()  # nothing of it is kept: it is large, and old in a moment

    def remove(self, name: str) -> None:
        """Remove a file or a subtree; no error when it is not there."""
        with contextlib.suppress(FileNotFoundError), _asking(self.path(name), "removed"):
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        Locally: temporary sibling, flush, fsync, rename, fsync of the folder. Object stores: one upload to the final
        key, which becomes visible when it is complete; a rename there would be a copy and a delete.

        Raises:
            StorageError: the folder cannot be written.
        """
        if self.local:
            publish(self.path(name), data)
        else:
            self._upload(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet, as `write`; False where it is. Of two who try at once, one succeeds.

        Locally a hard link of the temporary sibling (a rename under a lock where there are none), on object stores a
        conditional put.

        Raises:
            StorageError: the folder cannot be written, or its driver cannot write on condition.
        """
        try:
            if self.local:
                publish(self.path(name), data, new=True)
            else:
                self._upload(name, data, mode="create")
        except FileExistsError:
            return False
        return True

    def put(self, name: str, source: str | os.PathLike[str]) -> None:
        """Publish a large local file under `name`, as `write` does with bytes; `source` is left in place."""
        if self.local:
            publish(self.path(name), Path(source))
            return
        with _asking(self.path(name), "written"):
            self.fs.put_file(os.fspath(source), self.path(name))
        self.fs.invalidate_cache()

    def sweep(self) -> None:
        """Remove temporary files that dead processes of this host left behind."""
        if not self.local or not self.exists():
            return
        sweep(self.root)

    def _upload(self, name: str, data: bytes, **mode: str) -> None:
        target = self.path(name)
        try:
            self.fs.pipe_file(target, data, **mode)
        except FileExistsError:
            raise
        except Exception as error:  # every driver has its own types
            if mode and _is_refused_condition(error):
                raise FileExistsError(target) from error
            raise StorageError(f"{target}: cannot be written: {_first_line(error)}") from error
        self.fs.invalidate_cache()


def _scan_folder(path: str) -> Iterator[Entry]:
    young = time.time_ns() - YOUNG
    with os.scandir(path) as found:
        for each in found:
            try:
                made = each.stat()
            except FileNotFoundError:
                yield Entry(each.name, -1, "")
                continue
            old = max(made.st_mtime_ns, made.st_ctime_ns) < young
            stamp = f"{made.st_mtime_ns} {made.st_ctime_ns} {made.st_ino}" if old else ""
            yield Entry(each.name, made.st_size, stamp)


def _entry_of(info: dict[str, Any]) -> Entry:
    """An object as its driver lists it. Its stamp is the ETag, which names contents: times alone count seconds."""
    tag = info.get("ETag") or info.get("etag") or ""
    stamp = f"{tag} {info.get('LastModified') or info.get('last_modified') or info.get('updated')}" if tag else ""
    return Entry(info["name"].rstrip("/").rsplit("/", 1)[-1], int(info.get("size") or 0), stamp)


def _parameters_of(fs: Any, method: str) -> set[str]:
    return set(inspect.signature(getattr(fs, method)).parameters) if hasattr(fs, method) else set()


def _is_refused_condition(error: BaseException) -> bool:
    """Whether a store has refused a conditional put because the key is there (412; 409 while another is under way)."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    return any(word in text for word in ("PreconditionFailed", "ConditionalRequestConflict", "pre-conditions", "412"))


def check_kept(folder: Folder) -> None:
    """Raise AuditError for a place that is forgotten when the command ends."""
    if isinstance(folder.fs, MemoryFileSystem):
        raise AuditError(f"{folder.url}: is forgotten when the command ends: name a folder or a store that keeps it")
