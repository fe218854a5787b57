"""The commit protocol: a shard is done when its commit says so, and the commit is written last.

Every stage that fills a folder by shards (scan, refine, trajectories, confirm, mitigate, index) uses this one ledger.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.checkpoint import COLUMNS_AND_FILES, MANY, known_places, load_checkpoint, save_checkpoint, stamp_number
from audit.base.committed import Commit, Committed, Worker, as_one, columns_of
from audit.base.errors import AuditError, Damaged, StorageError, check_machine
from audit.base.facts import read_facts
from audit.base.storage import AT_ONCE, Folder

FEW, ONE_IN = 16, 250  # shards asked for one by one: a listing tells of some 250 files in the time of one question
PREFIXED = 10_000  # commits above which an object store is asked for them in parts
BLOCK = 4096  # commits held as objects at a time
MOVING = 1.0  # seconds that another worker may be between a file and its commit
HASHED = 256 << 20  # bytes of a stage up to which a reader hashes its files before it opens them

Asked = TypeVar("Asked")
Told = TypeVar("Told")


def table_bytes(table: pa.Table) -> bytes:
    """A table as one Arrow IPC FILE (a torn file fails to open; a torn stream would read as fewer rows)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@contextmanager
def damaged(path: str, way_out: str = "be-audit verify --repair does it again") -> Iterator[None]:
    """Turn what a missing or broken file of ours makes its reader raise into one line that names it."""
    try:
        yield
    except AuditError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        check_machine(path, error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise Damaged(f"{path}: damaged: {reason}: {way_out}") from error


def shard_name(shard: int) -> str:
    """`000/00042`: a thousand shards a subfolder keeps listings short."""
    return f"{shard // 1000:03d}/{shard:05d}"


def _still() -> None:
    """The check of a ledger whose stage nobody discards."""


@dataclass(frozen=True)
class Attempt:
    """A try of a shard that failed: why, who, when (ISO 8601)."""

    error: str
    worker: Worker
    time: str


@dataclass(frozen=True)
class Attempts:
    """What lies in _attempts/STAGE/00000.json."""

    tries: list[Attempt]


class Ledger:
    """The commits of one stage below one folder (`_commits/STAGE/00000.json`, `_attempts/STAGE/00000.json`).

    Args:
        folder: the run or index folder. stage: the stage's name. fingerprint: commits under another do not count.
        files: folder of its results: the commit of shard n names FILES/000/0000n.arrow and no other file.
        generation: where a stage may be discarded and begun anew, a folder of its own for commits, attempts and files.
        still: raises AuditError once another process has discarded the stage; asked before every commit.
    """

    def __init__(
        self,
        folder: Folder,
        stage: str,
        fingerprint: str,
        files: str,
        generation: str = "",
        still: Callable[[], None] = _still,
    ) -> None:
        self.folder, self.stage, self.fingerprint, self.still = folder, stage, fingerprint, still
        below = f"/{generation}" if generation else ""
        self.files, self._commits = f"{files}{below}", f"_commits/{stage}{below}"
        self._tries = f"_attempts/{stage}{below}"

    def name(self, shard: int) -> str:
        """Where the commit of a shard lies."""
        return f"{self._commits}/{shard:05d}.json"

    def file(self, shard: int) -> str:
        """Where the results of a shard lie."""
        return f"{self.files}/{shard_name(shard)}.arrow"

    def commit(
        self,
        shard: int,
        table: pa.Table,
        counts: dict[str, int] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Commit:
        """Write the shard's table whole, read it back, then write its commit.

        Raises:
            OSError: what was read back is not what was written.
            AuditError: the stage was discarded meanwhile.
        """
        self.still()
        data, file = table_bytes(table), self.file(shard)
        sha256 = hashlib.sha256(data).hexdigest()
        self.folder.write(file, data)
        back = self.folder.read(file)
        if hashlib.sha256(back).hexdigest() != sha256:
            raise OSError(f"{self.folder.path(file)}: read back other bytes than were written")
        made = Commit(
            stage=self.stage,
            shard=shard,
            file=file,
            rows=table.num_rows,
            bytes=len(data),
            sha256=sha256,
            fingerprint=self.fingerprint,
            counts=counts or {},
            seconds={key: round(value, 4) for key, value in (seconds or {}).items()},
            worker=Worker.this(),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        self.folder.write(self.name(shard), json.dumps(asdict(made), indent=1).encode())
        return made

    def read(self, shard: int) -> Commit | None:
        """The shard's commit, or None when there is none that parses, is of this stage, and names this shard's file."""
        try:
            made = read_facts(Commit, self.folder.read(self.name(shard)), self.name(shard))
            _check_time(made.finished)
            _check_numbers(made.rows, made.bytes, made.worker.pid, made.worker.rank, made.format)
            _check_numbers(*made.counts.values(), *made.seconds.values())
        except (FileNotFoundError, ValueError, OverflowError):
            return None
        except AuditError as error:
            if isinstance(error, StorageError):  # the store fails: nothing is known
                raise
            return None
        mine = (self.stage, shard, self.fingerprint, self.file(shard))
        if (made.stage, made.shard, made.fingerprint, made.file) != mine:
            return None
        return made

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The results of a committed shard, all columns or some.

        Raises:
            Damaged: there is no commit, no file, or the file is not the one that was committed, to the byte.
        """
        made, path = self.read(shard), self.folder.path(self.file(shard))
        with damaged(path):
            data = self.folder.read(self.file(shard))
            if made is None or hashlib.sha256(data).hexdigest() != made.sha256:
                raise ValueError("contents do not match the commit's sha256")
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            return table if columns is None else table.select(columns)

    def shards(self) -> list[int]:
        """Shards that have a commit file, readable or not."""
        return _numbers(self.folder.list(self._commits))

    def done(self, shards: Iterable[int] | None = None) -> Committed:
        """Every valid commit whose file is there with the right size (contents are checked by `problem`)."""
        wanted = None if shards is None else np.unique(np.fromiter(shards, np.int64))
        return self._each(wanted) if wanted is not None and _are_few(wanted) else self._listed(wanted)[1]

    def whole(self, shards: Iterable[int]) -> Committed:
        """The commits of those shards that have one, for a reader of what is committed.

        Files of HASHED bytes in all are also compared with their digests: pyarrow ends the process over some that are
        damaged.

        Raises:
            Damaged: a commit cannot be read, or its file is missing, of another size or of other contents.
        """
        wanted = np.unique(np.fromiter(shards, np.int64))
        if _are_few(wanted):
            done = self._each(wanted)
            doubtful = [shard for shard in done.lacking(wanted) if self.folder.exists(self.name(shard))]
        else:
            there, done = self._listed(wanted)
            doubtful = done.lacking(there)
        deep = done.bytes <= HASHED
        doubtful += [shard for shard, made in done.items() if self.problem(made, deep)] if deep else []
        mended = []
        for shard in sorted(doubtful):
            made, why = self._look(shard, deep)
            if why:
                time.sleep(MOVING)
                made, why = self._look(shard, deep)
            if made is None and not self.folder.exists(self.name(shard)):
                done = done.only(done.shards != shard)
                continue  # taken back meanwhile
            if why or made is None:
                raise Damaged(f"{self.folder.path(why)}: be-audit verify {self.folder.url} --repair does it again")
            mended.append(made)
        return done.with_these(mended)

    def _each(self, shards: NDArray[np.int64]) -> Committed:
        """`done` of some shards, each asked for by itself."""

        def look(shard: int) -> Commit | None:
            made = self.read(shard)
            return made if made and self.problem(made) is None else None

        found = self._side_by_side(look, shards.tolist())
        return self._committed([columns_of(made for made in found if made)])

    def _listed(self, wanted: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], Committed]:
        """Shards that have a commit file, readable or not, and `done`: of all or of those wanted, by listings.

        A commit is taken from the checkpoint where the listing shows the very file it was made from.
        """
        shards, sizes, stamps = self._list(wanted)
        known = load_checkpoint(self.folder, self._commits, self._key)
        known = COLUMNS_AND_FILES.empty_table() if known is None else known
        places = known_places(known, shards, sizes, stamps)
        parts = []
        unknown = np.flatnonzero(places < 0)
        for at in np.split(unknown, range(BLOCK, len(unknown), BLOCK)):
            part = columns_of(made for made in self._side_by_side(self.read, shards[at].tolist()) if made)
            files = at[np.isin(shards[at], part["shard"].to_numpy())]  # listed before they were read
            part = part.append_column("file_size", pa.array(sizes[files]))
            parts.append(part.append_column("file_stamp", pa.array(stamps[files])))
        read = as_one(parts)
        del parts
        if len(unknown) > MANY:
            self._save(known, read)
        if len(unknown) or len(places) < known.num_rows:
            known = known.take(pa.array(places[places >= 0]))
        made = self._committed([known, read])
        return shards, made.only(self._sizes(made.shards) == made.table["bytes"].to_numpy())

    def _list(
        self, wanted: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """The commit files that are there, by shard: their shards, sizes and stamps, [n] each."""
        shards, sizes, stamps = array("q"), array("q"), array("Q")
        for name, size, stamp in self.folder.entries(self._commits, wanted is not None and len(wanted) > PREFIXED):
            if _is_number(stem := name[:-5]) and name == f"{int(stem):05d}.json":  # and not 42.json
                shards.append(int(stem))
                sizes.append(size)
                stamps.append(stamp_number(stamp))
        found = np.frombuffer(shards, np.int64)
        order = np.argsort(found)
        order = order if wanted is None else order[np.isin(found[order], wanted)]
        return found[order], np.frombuffer(sizes, np.int64)[order], np.frombuffer(stamps, np.uint64)[order]

    def _sizes(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of the results of shards [n], in order; -1 where there are none. One listing a thousand shards."""
        found = np.full(len(shards), -1, np.int64)
        folders = np.split(shards, np.flatnonzero(np.diff(shards // 1000)) + 1) if len(shards) else []

        def ask(some: NDArray[np.int64]) -> list[int]:
            folder = self.file(int(some[0])).rpartition("/")[0]
            sizes = {name: size for name, size, _ in self.folder.entries(folder)}
            return [sizes.get(f"{shard:05d}.arrow", -1) for shard in some.tolist()]

        at = 0
        for some in self._side_by_side(ask, folders):
            found[at : at + len(some)] = some
            at += len(some)
        return found

    def _save(self, known: pa.Table, read: pa.Table) -> None:
        """A checkpoint of what one had and of what was read, where a stamp will tell whether it changed."""
        told = read["file_stamp"].to_numpy() != 0
        read = read if told.all() else read.filter(pa.array(told))
        if read.num_rows <= MANY:
            return
        kept = known.filter(pc.invert(pc.is_in(known["shard"], read["shard"].combine_chunks())))
        try:
            self.still()
        except AuditError:
            return  # discarded meanwhile: it would lie there for ever
        save_checkpoint(self.folder, self._commits, self._key, as_one([kept, read]))

    @property
    def _key(self) -> str:
        return f"{self._commits} {self.files} {self.fingerprint}"

    def _committed(self, tables: Iterable[pa.Table]) -> Committed:
        return Committed(tables, self.stage, self.fingerprint, self.file)

    def _side_by_side(self, ask: Callable[[Asked], Told], items: Sequence[Asked]) -> Iterator[Told]:
        """What a function tells of each; of an object store, of several at once."""
        if self.folder.local:
            yield from map(ask, items)
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(ask, items)

    def _look(self, shard: int, deep: bool) -> tuple[Commit | None, str]:
        """A shard's commit, and what is wrong with it or its file; "" where nothing is."""
        made = self.read(shard)
        return made, (self.problem(made, deep) or "") if made else f"{self.name(shard)}: damaged"

    def problem(self, made: Commit, deep: bool = False) -> str | None:
        """What is wrong with a commit's file, in words; None when nothing is. `deep` reads and hashes it."""
        try:
            size = self.folder.size(made.file)
        except FileNotFoundError:
            return f"{made.file}: missing"
        if size != made.bytes:
            return f"{made.file}: {size} bytes where the commit says {made.bytes}"
        if deep:
            data = self.folder.read(made.file)
            if hashlib.sha256(data).hexdigest() != made.sha256:
                return f"{made.file}: contents do not match the commit's sha256"
            try:
                rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().num_rows
            except MemoryError:  # the bytes are the commit's
                raise
            except (pa.ArrowException, OSError) as error:
                check_machine(self.folder.path(made.file), error)
                return f"{made.file}: cannot be read: {str(error).splitlines()[0]}"
            if rows != made.rows:
                return f"{made.file}: {rows} rows where the commit says {made.rows}"
        return None

    def drop(self, shard: int) -> None:
        """Take a commit and its attempts back, so that the shard is done again."""
        self.folder.remove(self.name(shard))
        self.forget_attempts(shard)

    def forget_attempts(self, shard: int) -> None:
        """Let a shard be tried as if it never had been."""
        self.folder.remove(self._attempts(shard))

    def tried(self) -> set[int]:
        """Shards with a failed try on record."""
        return set(_numbers(self.folder.list(self._tries)))

    def attempts(self, shard: int) -> list[Attempt]:
        """Failed tries of a shard, oldest first; [] where their file is damaged: nothing rests on it."""
        try:
            data = self.folder.read(self._attempts(shard))
            tries = read_facts(Attempts, b'{"tries": ' + data + b"}", self._attempts(shard)).tries
            for each in tries:
                _check_time(each.time)
                _check_numbers(each.worker.pid, each.worker.rank)
            return tries
        except (FileNotFoundError, ValueError, OverflowError):
            return []
        except StorageError:
            raise
        except AuditError:
            return []

    def record_attempt(self, shard: int, error: str) -> int:
        """Note a failed try; returns how many there are now."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tries = [*self.attempts(shard), Attempt(error, Worker.this(), now)]
        data = json.dumps([asdict(each) for each in tries], indent=1).encode()
        self.folder.write(self._attempts(shard), data)
        return len(tries)

    def _attempts(self, shard: int) -> str:
        return f"{self._tries}/{shard:05d}.json"


def _check_time(text: str) -> None:
    """Raise ValueError where it is no ISO 8601 time with a zone, of a year that a clock can show."""
    if not 1970 <= datetime.fromisoformat(text).astimezone(timezone.utc).year < 3000:
        raise ValueError(text)


def _check_numbers(*numbers: float) -> None:
    """Raise ValueError for what no count and no time can be."""
    if not all(0 <= number < 1 << 62 for number in numbers):
        raise ValueError(str(numbers))


def _are_few(shards: NDArray[np.int64]) -> bool:
    """Whether some shards [n], in order, are better asked for one by one than looked for in a listing of all."""
    return not len(shards) or len(shards) <= max(FEW, (shards[-1] + 1) // ONE_IN)


def _numbers(names: Iterable[str]) -> list[int]:
    """Shards of names like 00042.json."""
    stems = (name[:-5] for name in names if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if _is_number(stem))


def _is_number(stem: str) -> bool:
    return stem.isascii() and stem.isdigit() and len(stem) < 10
