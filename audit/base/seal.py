"""Size and hash of files that results rest on, kept in a file written after them: who opens them checks them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from audit.base.errors import Damaged
from audit.base.fingerprint import file_sha256
from audit.base.storage import Folder


@dataclass(frozen=True)
class Seal:
    """What a file was when it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes | Path) -> Seal:
        """The seal of bytes, or of a local file."""
        if isinstance(data, Path):
            return cls(data.stat().st_size, file_sha256(data))
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def problem(self, folder: Folder, name: str) -> str | None:
        """What is wrong with the file by now, in words; None when nothing is. Reads it all, in pieces."""
        try:
            size = folder.size(name)
            if size != self.size:
                return f"{name}: damaged: {size} bytes where {self.size} were written"
            total = hashlib.sha256()
            with folder.open(name) as file:
                while chunk := file.read(1 << 22):
                    total.update(chunk)
        except FileNotFoundError:
            return f"{name}: missing"
        return None if total.hexdigest() == self.sha256 else f"{name}: damaged: not the bytes that were written"


def read_sealed(folder: Folder, name: str, seal: Seal | None) -> bytes:
    """A small file whole.

    Raises:
        Damaged: it is not there, or not what was sealed; `seal` None takes it as it is.
    """
    try:
        data = folder.read(name)
    except FileNotFoundError:
        data = None
    if data is None or (seal is not None and Seal.of(data) != seal):
        what = "missing" if data is None else "damaged: not the bytes that were written"
        raise Damaged(f"{folder.path(name)}: {what}: be-audit verify {folder.url} --repair makes it again")
    return data
