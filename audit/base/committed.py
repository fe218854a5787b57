"""Commits held as columns: a million of them take a few hundred megabytes, where as many objects take gigabytes."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

FORMAT = 1
AT_ONCE = 64  # Commit objects made together: one by one is slow where all are read in order


@dataclass(frozen=True)
class Worker:
    """Who did it: host, pid and scheduler rank."""

    host: str = ""
    pid: int = 0
    rank: int = 0

    @classmethod
    def this(cls) -> Worker:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), int(os.environ.get("BE_AUDIT_RANK", "0")))


@dataclass(frozen=True)
class Commit:
    """What a commit file holds: which bytes are the shard's result, and what it took.

    Attributes:
        file: path of the result in the folder; bytes, sha256 and rows describe it.
        counts: rows by status.
        seconds: wall time by step (read, score, write, ...).
    """

    stage: str
    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str
    fingerprint: str
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker: Worker = field(default_factory=Worker)
    finished: str = ""
    format: int = FORMAT


_FEW = pa.dictionary(pa.int32(), pa.string())
COLUMNS = pa.schema(
    [
        ("shard", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("count_names", _FEW),  # the names of `counts` as JSON: nearly all commits of a stage have the same
        ("counts", pa.list_(pa.int64())),
        ("step_names", _FEW),
        ("seconds", pa.list_(pa.float64())),
        ("host", _FEW),
        ("pid", pa.int64()),
        ("rank", pa.int64()),
        ("finished", pa.string()),
        ("format", pa.int64()),
    ]
)
"""Of a commit, but for what all commits of a ledger share (stage, fingerprint) or the shard tells (file)."""


def columns_of(commits: Iterable[Commit]) -> pa.Table:
    """Some commits as a table COLUMNS."""
    made = list(commits)
    columns = {
        "shard": [each.shard for each in made],
        "rows": [each.rows for each in made],
        "bytes": [each.bytes for each in made],
        "sha256": [each.sha256 for each in made],
        "count_names": [json.dumps(list(each.counts)) for each in made],
        "counts": [list(each.counts.values()) for each in made],
        "step_names": [json.dumps(list(each.seconds)) for each in made],
        "seconds": [list(each.seconds.values()) for each in made],
        "host": [each.worker.host for each in made],
        "pid": [each.worker.pid for each in made],
        "rank": [each.worker.rank for each in made],
        "finished": [each.finished for each in made],
        "format": [each.format for each in made],
    }
    return pa.table(columns, schema=COLUMNS)


def as_one(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables with `shard` as one in its order and in one piece; copied only where they are not yet."""
    parts = list(tables)
    filled = [part for part in parts if part.num_rows]
    table = pa.concat_tables(filled or parts[:1])
    if any(column.num_chunks > 1 for column in table.columns):
        table = table.unify_dictionaries().combine_chunks()
    return table.sort_by("shard") if np.any(np.diff(table["shard"].to_numpy()) < 0) else table


class Committed(Mapping[int, Commit]):
    """Commits of one stage by shard, in the order of the shards; a Commit is made when it is asked for.

    Args:
        tables: parts of COLUMNS, each shard in one of them.
        stage, fingerprint: of all of them. file: where the results of a shard lie.

    Attributes:
        table: COLUMNS, sorted by shard. shards: int64 [n].
    """

    def __init__(self, tables: Iterable[pa.Table], stage: str, fingerprint: str, file: Callable[[int], str]) -> None:
        self.stage, self.fingerprint, self.file = stage, fingerprint, file
        self.table: pa.Table = as_one(part.select(COLUMNS.names) for part in (*tables, COLUMNS.empty_table()))
        self.shards: NDArray[np.int64] = self.table["shard"].to_numpy()
        self._made: tuple[int, list[Commit]] = (-1, [])

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self.shards.tolist())

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, (int, np.integer)) and self._place(int(shard)) is not None

    def __getitem__(self, shard: int) -> Commit:
        place = self._place(shard)
        if place is None:
            raise KeyError(shard)
        block, made = self._made
        if place // AT_ONCE != block:
            block = place // AT_ONCE
            made = [self._commit(row) for row in self.table.slice(block * AT_ONCE, AT_ONCE).to_pylist()]
            self._made = block, made
        return made[place % AT_ONCE]

    def lacking(self, shards: Iterable[int] | NDArray[np.int64]) -> list[int]:
        """Those of some shards that have no commit here, in the order given."""
        asked = shards if isinstance(shards, np.ndarray) else np.fromiter(shards, np.int64)
        found: list[int] = asked[~np.isin(asked, self.shards)].tolist()
        return found

    def only(self, keep: NDArray[np.bool_]) -> Committed:
        """Those at which `keep` [n] is true."""
        return self if keep.all() else Committed([self.table.filter(pa.array(keep))], *self._shared)

    def with_these(self, commits: Iterable[Commit]) -> Committed:
        """With some commits added, or in the place of those of their shards."""
        added = columns_of(commits)
        kept = self.only(~np.isin(self.shards, added["shard"].to_numpy()))
        return Committed([kept.table, added], *self._shared) if added.num_rows else self

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(self.table["rows"].to_pylist())

    @property
    def bytes(self) -> int:
        """Bytes of all their results."""
        return sum(self.table["bytes"].to_pylist())

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, of all of them."""
        return self._sums("count_names", "counts")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by step, of all of them."""
        return self._sums("step_names", "seconds")

    def counted(self, status: str) -> NDArray[np.int64]:
        """Rows of a status, by commit [n]; 0 where it has no such count."""
        return self._column("count_names", "counts", status).filled(0)

    def took(self, step: str) -> np.ma.MaskedArray[Any, Any]:
        """Seconds of a step, by commit [n]; masked where it has none."""
        return self._column("step_names", "seconds", step)

    def steps(self) -> pa.MapArray:
        """Seconds by step, by commit [n]."""
        keys, values, offsets = self._flat("step_names", "seconds")
        return pa.MapArray.from_arrays(offsets, keys.cast(pa.string()), values)

    def finished(self) -> NDArray[np.float64]:
        """When each was committed, seconds since 1970 [n]."""
        column, block = self.table["finished"], 1 << 16  # a million texts at once take more than all the rest
        texts = (text for at in range(0, len(self), block) for text in column.slice(at, block).to_pylist())
        return np.fromiter((datetime.fromisoformat(text).timestamp() for text in texts), np.float64, len(self))

    @property
    def _shared(self) -> tuple[str, str, Callable[[int], str]]:
        return self.stage, self.fingerprint, self.file

    def _place(self, shard: int) -> int | None:
        place = int(np.searchsorted(self.shards, shard))
        return place if place < len(self.shards) and self.shards[place] == shard else None

    def _commit(self, row: dict[str, Any]) -> Commit:
        return Commit(
            stage=self.stage,
            shard=row["shard"],
            file=self.file(row["shard"]),
            rows=row["rows"],
            bytes=row["bytes"],
            sha256=row["sha256"],
            fingerprint=self.fingerprint,
            counts=dict(zip(_names(row["count_names"]), row["counts"], strict=True)),
            seconds=dict(zip(_names(row["step_names"]), row["seconds"], strict=True)),
            worker=Worker(row["host"], row["pid"], row["rank"]),
            finished=row["finished"],
            format=row["format"],
        )

    def _flat(self, names: str, values: str) -> tuple[pa.DictionaryArray, pa.Array, pa.Array]:
        """Every name and value, commit by commit, and where those of each begin [n + 1]."""
        column, numbers = self.table[names].combine_chunks(), self.table[values].combine_chunks()
        known = [_names(text) for text in column.dictionary.to_pylist()]
        keys = pa.array(known, pa.list_(_FEW)).take(column.indices).flatten()
        return keys, numbers.flatten(), numbers.offsets

    def _sums(self, names: str, values: str) -> dict[str, Any]:
        keys, numbers, _ = self._flat(names, values)
        codes, flat = keys.indices.to_numpy(), numbers.to_numpy()
        there, first = np.unique(codes, return_index=True)
        in_order = there[np.argsort(first)].tolist()
        # sums of Python, which do not overflow
        return {keys.dictionary[code].as_py(): sum(flat[codes == code].tolist()) for code in in_order}

    def _column(self, names: str, values: str, name: str) -> np.ma.MaskedArray[Any, Any]:
        """What has this name, masked where a commit has it not."""
        keys, numbers, offsets = self._flat(names, values)
        flat = numbers.to_numpy()
        found = np.ma.masked_all(len(self), flat.dtype)
        code = pc.index(keys.dictionary, name).as_py()
        at = np.flatnonzero(keys.indices.to_numpy() == code)
        found[np.repeat(np.arange(len(self)), np.diff(offsets.to_numpy()))[at]] = flat[at]
        return found


@functools.lru_cache(maxsize=64)
def _names(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))
