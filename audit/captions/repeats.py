"""Which rows repeat an earlier caption, found on disk: memory does not grow with the rows."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import humanize
import numpy as np
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.base.progress import Progress

CHUNK = 1 << 18  # rows sorted into parts together
PART_ROWS, MOST_PARTS = 1 << 20, 256  # rows that a part should have; parts at most
_HASHED = np.dtype([("hash", "<u8"), ("row", "<i8")])
_REPEAT = np.dtype([("row", "<i8"), ("first", "<i8")])


class Repeats:
    """Finds equal hashes by writing them to parts by their top bits, each small enough to be sorted in memory.

    What repeats is then kept by ranges of rows, since it is asked for a shard at a time. The files, 16 bytes a row and
    16 more for one that repeats, are in a temporary folder (TMPDIR) as long as this object lives.

    Args:
        rows: how many there will be.

    Attributes:
        count: rows that repeat an earlier one, once `resolve` was called.
    """

    def __init__(self, rows: int) -> None:
        parts = min(MOST_PARTS, 1 << (max(rows - 1, 0) // PART_ROWS).bit_length())
        self.count = 0
        self._rows, self._bits = rows, parts.bit_length() - 1
        self._range = -(-max(rows, 1) // parts)  # rows of a range
        self._temporary = tempfile.TemporaryDirectory(prefix="be-audit-")
        self._folder = Path(self._temporary.name)
        self._held: list[NDArray[np.void]] = []
        self._at = -1, np.zeros(0, _REPEAT)  # the range read last, and its rows in order

    def add(self, start: int, hashes: NDArray[np.uint64]) -> None:
        """Rows from `start` on, after those added before; 0 repeats nothing.

        Raises:
            AuditError: no room on the disk.
        """
        rows = np.flatnonzero(hashes)
        added = np.empty(len(rows), _HASHED)
        added["hash"], added["row"] = hashes[rows], start + rows
        self._held.append(added)
        if sum(len(each) for each in self._held) >= CHUNK:
            self._write_held()

    def resolve(self) -> None:
        """Find what repeats, once all rows were added.

        Raises:
            AuditError: no room on the disk.
        """
        self._write_held()
        paths = sorted(self._folder.glob("hashes-*"))
        with Progress(len(paths), "parts", "equal captions") if len(paths) > 8 else nullcontext() as bar:
            for path in paths:
                hashed = np.fromfile(path, _HASHED)
                _, first, inverse = np.unique(hashed["hash"], return_index=True, return_inverse=True)
                repeats = np.empty(len(hashed), _REPEAT)
                repeats["row"], repeats["first"] = hashed["row"], hashed["row"][first][inverse]
                repeats = repeats[repeats["row"] != repeats["first"]]
                self.count += len(repeats)
                self._append("repeats", repeats["row"] // self._range, repeats)
                path.unlink()
                if bar:
                    bar.add(1)

    def between(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows in [start, stop) that repeat an earlier one, in order, and for each the first row like it."""
        found = []
        for number in range(start // self._range, -(-stop // self._range)):
            rows = self._in_range(number)
            low, high = np.searchsorted(rows["row"], [start, stop])
            found.append(rows[low:high])
        repeats = np.concatenate(found) if found else np.zeros(0, _REPEAT)
        return repeats["row"], repeats["first"]

    def _in_range(self, number: int) -> NDArray[np.void]:
        if self._at[0] != number:
            path = self._folder / f"repeats-{number:03d}"
            rows = np.fromfile(path, _REPEAT) if path.exists() else np.zeros(0, _REPEAT)
            self._at = number, rows[np.argsort(rows["row"])]
        return self._at[1]

    def _write_held(self) -> None:
        if self._held:
            hashed = np.concatenate(self._held)
            self._held.clear()
            shift = np.uint64(64 - self._bits)
            parts = hashed["hash"] >> shift if self._bits else np.zeros(len(hashed), np.uint64)
            self._append("hashes", parts, hashed)

    def _append(self, name: str, numbers: NDArray[np.integer], rows: NDArray[np.void]) -> None:
        """Add rows to the files of their numbers, in order."""
        order = np.argsort(numbers.astype(np.int16), kind="stable")
        rows, numbers = rows[order], numbers[order]
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
        with self._no_room():
            for start, stop in itertools.pairwise(cuts):
                if stop > start:
                    with open(self._folder / f"{name}-{int(numbers[start]):03d}", "ab") as file:
                        file.write(rows[start:stop].tobytes())

    @contextmanager
    def _no_room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            least, most = (humanize.naturalsize(times * _HASHED.itemsize * self._rows) for times in (1, 2))
            raise AuditError(
                f"{self._folder}: planning {self._rows:,} rows takes some {least} to {most} there, and they cannot be "
                f"written: {error.strerror}; set TMPDIR to a folder with room"
            ) from error
