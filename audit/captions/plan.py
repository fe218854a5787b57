"""The plan of a run: its files, its shards, and which captions repeat an earlier one.

Planning reads every caption once and keeps 64 bits of each, on a disk; nothing that it holds grows with the rows.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from audit.base.commits import damaged
from audit.base.errors import AuditError
from audit.base.identity import CAPTIONS
from audit.base.ours import MARK
from audit.base.seal import Seal, read_sealed
from audit.base.storage import Folder
from audit.base.text import reasons
from audit.captions.carried import carried_schema
from audit.captions.files import CaptionFile, Described, describe
from audit.captions.find import Found, find_captions
from audit.captions.hashes import ShardDigests, hash_captions
from audit.captions.remarks import Remarks
from audit.captions.repeats import Repeats
from audit.captions.rows import BATCH_ROWS, find_column, in_reach
from audit.captions.sample import LowestHashes
from audit.captions.streams import stream
from audit.captions.text_lines import PLAIN, TextFormat
from audit.captions.values import decoded

AUTO: Literal["auto"] = "auto"
LEAST_ROWS, MOST_SHARDS, MOST_SECONDS = 1024, 20_000, 300  # of a shard, of a run, of a shard on its device
SHARDS = pa.schema(
    [
        ("shard_id", pa.int32()),
        ("input_file", pa.string()),
        ("file_index", pa.int32()),
        ("row_start", pa.int64()),
        ("row_count", pa.int32()),
        ("captions_xxh3", pa.uint64()),  # of the captions' hashes: a shard's rows are known again when they are read
        ("duplicates_xxh3", pa.uint64()),  # of the shard's batch of duplicates.arrow
    ]
)
DUPLICATES = pa.schema([("row_id", pa.int64()), ("duplicate_of", pa.int64())])
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True)
class PlanFacts:
    """What was found and what was left out, to be said before any work.

    Attributes:
        files: read. caption_columns: column -> why it was taken. carried: columns carried through.
        left_out: reason -> files that were not read. notes: what else a user should know, a sentence each.
    """

    files: int = 0
    caption_columns: dict[str, str] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self, rows: int, unique: int, empty: int) -> list[str]:
        """For people."""
        columns = "; ".join(f"{name} ({why})" for name, why in self.caption_columns.items())
        files = f"{self.files:,} file{'s' if self.files != 1 else ''}"
        lines = [
            f"plan: {files}, {rows:,} rows, {unique:,} different captions, {empty:,} empty; captions from {columns}; "
            f"carried: {', '.join(self.carried) or 'nothing'}"
        ]
        if self.left_out:
            lines.append(f"left out: {reasons(self.left_out)}")
        return lines + [f"note: {note}" for note in self.notes]


@dataclass(eq=False)
class CaptionPlan:
    """Which rows a run has: its files, its shards and which rows repeat an earlier caption.

    Attributes:
        files: the inputs in order.
        shards: table SHARDS, a row a shard; a shard lies in one file.
        keep_schema: the input columns that are carried through, with the one type they have in every shard.
        num_rows, num_unique, num_empty: rows in all; distinct captions; rows null, empty or only whitespace.
        facts: what was found and left out; of a plan that was loaded, nothing: run.json has it.
        rows_per_shard: never `auto`; of a plan that was loaded 0: run.json has it.
        sample: rows that the null maps are made of, as row_id, by the hash of their captions (`LowestHashes`).
    """

    files: list[CaptionFile]
    shards: pa.Table
    keep_schema: pa.Schema
    num_rows: int
    num_unique: int
    num_empty: int
    facts: PlanFacts = field(default_factory=PlanFacts)
    rows_per_shard: int = 0
    sample: list[int] = field(default_factory=list)
    _repeats: Repeats | None = field(default=None, repr=False)  # of a plan that was made, not loaded
    _folder: Folder | None = field(default=None, repr=False)
    _staged: dict[str, Seal] = field(default_factory=dict, repr=False)

    @property
    def keep_cols(self) -> list[str]:
        """Names of the input columns that are carried through."""
        return list(self.keep_schema.names)

    def __len__(self) -> int:
        return int(self.shards.num_rows)

    def duplicates(self, shard: int) -> np.ndarray:
        """row_id of the first row with the same caption, for each row of a shard; int64 [row_count], -1 where none.

        The first occurrence itself and empty captions have -1.
        """
        if self._repeats is not None:
            return self._duplicates_of(shard, self._repeats)
        assert self._folder is not None
        again = f"be-audit verify {self._folder.url} --repair makes it again"
        with damaged(self._folder.path("duplicates.arrow"), again):
            batch = _duplicate_batches(self._folder.url).get_batch(shard)
            if _digest_of(batch["row_id"], batch["duplicate_of"]) != self.shards["duplicates_xxh3"][shard].as_py():
                raise ValueError(f"batch {shard} is not what was planned")
        count = self.shards["row_count"][shard].as_py()
        found = np.full(count, -1, np.int64)
        found[batch["row_id"].to_numpy() & 0xFFFFFFFF] = batch["duplicate_of"].to_numpy()
        return found

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        counts = self.shards["row_count"].to_numpy().astype(np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def row_ids(self, rows: np.ndarray) -> np.ndarray:
        """row_id of rows counted over all inputs, int64."""
        of = np.searchsorted(self._starts, rows, side="right") - 1
        return (of << 32) | (rows - self._starts[of])

    def _duplicates_of(self, shard: int, repeats: Repeats) -> np.ndarray:
        start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
        found = np.full(stop - start, -1, np.int64)
        rows, first = repeats.between(start, stop)
        found[rows - start] = self.row_ids(first)
        return found

    def save(self, folder: Folder) -> dict[str, Seal]:
        """Write `duplicates.arrow` (batch i holds shard i's duplicates) and then `plan.arrow` into a run folder.

        Returns:
            the seals of both and of the staged inputs, by name.
        """
        digests = []
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "duplicates.arrow")
            with pa.ipc.new_file(path, DUPLICATES.with_metadata(MARK)) as writer:
                for shard in range(len(self)):
                    of = self.duplicates(shard)
                    rows = np.flatnonzero(of >= 0)
                    ids = [pa.array((shard << 32) | rows, pa.int64()), pa.array(of[rows], pa.int64())]
                    digests.append(_digest_of(*ids))
                    writer.write_batch(pa.record_batch(ids, schema=DUPLICATES))
            sealed = {**self._staged, "duplicates.arrow": Seal.of(path)}
            folder.put("duplicates.arrow", path)
        _duplicate_batches.cache_clear()  # the folder may have held another run before
        place = SHARDS.get_field_index("duplicates_xxh3")
        self.shards = self.shards.set_column(place, SHARDS.field(place), [pa.array(digests, pa.uint64())])
        facts = {
            "files": [file.to_dict() for file in self.files],
            "keep_schema": self.keep_schema.serialize().to_pybytes().hex(),
            "counts": [self.num_rows, self.num_unique, self.num_empty],
            "sample": self.sample,
        }
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SHARDS.with_metadata({b"captions": json.dumps(facts).encode(), **MARK})) as writer:
            writer.write_table(self.shards)
        data = sink.getvalue().to_pybytes()
        folder.write("plan.arrow", data)
        return {**sealed, "plan.arrow": Seal.of(data)}

    @classmethod
    def load(cls, folder: Folder, seal: Seal | None = None) -> CaptionPlan:
        """Read `plan.arrow`; the duplicates of a shard are read, and checked, when asked for.

        Raises:
            Damaged: it is not there, not what was sealed, or cannot be read.
        """
        data = read_sealed(folder, "plan.arrow", seal)
        with damaged(folder.path("plan.arrow")):
            shards = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            facts = json.loads(shards.schema.metadata[b"captions"])
            files = [CaptionFile.from_dict(fields) for fields in facts["files"]]
            keep = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(facts["keep_schema"])))
            rows, unique, empty = facts["counts"]
            sample = [int(row) for row in facts.get("sample", ())]  # a plan of before there were null maps has none
        shards = shards.replace_schema_metadata(None)
        return cls(files, shards, keep, rows, unique, empty, sample=sample, _folder=folder)


def _digest_of(*columns: pa.Array) -> int:
    """xxh3 of the values of int64 columns."""
    total = xxhash.xxh3_64()
    for column in columns:
        total.update(column.to_numpy(zero_copy_only=False).tobytes())
    return int(total.intdigest())


@functools.lru_cache(maxsize=2)
def _duplicate_batches(url: str) -> Any:
    return pa.ipc.open_file(Folder(url).open("duplicates.arrow"))


def describe_captions(
    inputs: Sequence[str], *, caption_col: str | None = None, text_format: TextFormat = PLAIN
) -> list[CaptionFile]:
    """The inputs as they are now, without reading their rows (-1 where only that would tell) or staging them.

    Args:
        inputs: see `find_captions`.
        caption_col: the caption column; found by itself when None.
        text_format: how text files are written.

    Raises:
        AuditError: bad input, as `plan_captions`.
    """
    return [each.file for each in _describe_all(find_captions(inputs), caption_col, text_format)]


def _describe_all(found: Found, caption_col: str | None, text_format: TextFormat) -> list[Described]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda source: describe(source, caption_col, text=text_format), found.sources))


def auto_rows_per_shard(rows: int) -> int:
    """Rows of a shard of a run of so many: at least LEAST_ROWS, and more where there would be over MOST_SHARDS.

    How long a shard lasts is not known when it is planned: `rows_in_time` says what a measured speed allows.
    """
    return max(LEAST_ROWS, -(-rows // MOST_SHARDS))


def rows_in_time(rate: float) -> int:
    """Rows of a shard that lasts at most MOST_SECONDS at so many rows a second, at least LEAST_ROWS."""
    return max(LEAST_ROWS, int(MOST_SECONDS * rate))


def plan_captions(
    inputs: Sequence[str],
    *,
    caption_col: str | None,
    keep_cols: Sequence[str] | None,
    limit: int | None,
    rows_per_shard: int | Literal["auto"],
    staging: Folder,
    reserved: Collection[str] = (),
    text_format: TextFormat = PLAIN,
) -> CaptionPlan:
    """Look at all inputs, cut them into shards and find equal captions.

    Captions are compared exactly as they are, by their xxh3 64-bit hash: n distinct captions have n^2 / 2^65 pairs
    of equal hashes to expect, 0.003 for 300 million.

    Args:
        inputs: files, folders, globs, URLs, data set names.
        caption_col: the caption column; None finds it, see audit/base/identity.py.
        keep_cols: input columns to carry through; None takes those whose name says url, key, id or hash.
        limit: the first so many rows over all inputs in order; None for all.
        rows_per_shard: rows of a shard, the last of a file excepted; `auto`: `auto_rows_per_shard`.
        staging: where inputs without random access are copied to, as `input/00000.arrow`.
        reserved: names in lower case that no carried column may have: those of a run's own.
        text_format: how text files are written.

    Raises:
        AuditError: whatever is wrong with the inputs, in one line.
    """
    if rows_per_shard != AUTO and not isinstance(rows_per_shard, int):
        raise AuditError(f"--rows-per-shard {rows_per_shard}: a whole number of at least 1, or {AUTO}")
    if rows_per_shard != AUTO and rows_per_shard < 1:
        raise AuditError(f"--rows-per-shard {rows_per_shard}: at least 1")
    if limit is not None and limit < 1:
        raise AuditError(f"--limit {limit}: at least 1")
    found = find_captions(inputs)
    described = _describe_all(found, caption_col, text_format)
    keep, notes = carried_schema(described, keep_cols, reserved)
    files, taken, left = [], [], limit
    sealed: dict[str, Seal] = {}
    remarks = Remarks(CAPTIONS)
    for index, each in enumerate(described):
        file = each.file
        if each.streamed:
            name = f"input/{index:05d}.arrow"
            file = _stage(file, name, each.schema, keep, left, staging, sealed, text_format, remarks)
        rows = file.rows if left is None else min(file.rows, left)
        left = None if left is None else left - rows
        files.append(file)
        taken.append(rows)
    notes = [*notes, *remarks.lines()]
    if not sum(taken):
        raise AuditError(
            f"{files[0].path}: no rows" + (f", nor in the other {len(files) - 1} files" if files[1:] else "")
        )
    per_shard = auto_rows_per_shard(sum(taken)) if rows_per_shard == AUTO else rows_per_shard
    if rows_per_shard == AUTO and per_shard > LEAST_ROWS:
        notes = [
            *notes,
            f"shards of {per_shard:,} rows, so that there are at most some {MOST_SHARDS:,}; how long one lasts was "
            "not known: `scan --dry-run` says it, --rows-per-shard sets it",
        ]
    shards = _shards(files, taken, per_shard)
    digests, repeats, lowest, empty = (
        ShardDigests(shards["row_count"].to_pylist()),
        Repeats(sum(taken)),
        LowestHashes(),
        0,
    )
    for at, hashes in hash_captions(files, taken, staging):
        digests.add(hashes)
        repeats.add(at, hashes)
        lowest.add(at, hashes)
        empty += int((hashes == 0).sum())
    repeats.resolve()
    place = SHARDS.get_field_index("captions_xxh3")
    shards = shards.set_column(place, SHARDS.field(place), [pa.array(digests.found, pa.uint64())])
    distinct = sum(taken) - empty - repeats.count
    facts = PlanFacts(
        files=len(files),
        caption_columns={each.file.caption_col: each.why for each in reversed(described) if each.file.rows},
        carried=list(keep.names),
        left_out=dict(found.left_out),
        notes=notes,
    )
    plan = CaptionPlan(
        files, shards, keep, sum(taken), distinct, empty, facts, per_shard, _repeats=repeats, _staged=sealed
    )
    plan.sample = plan.row_ids(lowest.rows).tolist()
    return plan


def _stage(
    file: CaptionFile,
    name: str,
    schema: pa.Schema,
    keep: pa.Schema,
    left: int | None,
    staging: Folder,
    sealed: dict[str, Seal],
    text_format: TextFormat,
    remarks: Remarks,
) -> CaptionFile:
    """Copy the columns a run needs of a source without random access, at most `left` rows, as an Arrow IPC file.

    Dictionaries are written out: such a file has one of each for all batches, which sources need not have.
    """
    if left == 0 or file.rows == 0:
        return replace(file, rows=0)
    places = {column.name: find_column(schema, column.name) for column in keep}
    columns = list(dict.fromkeys(schema.names[at] for at in places.values() if at >= 0))
    rows = 0
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "staged.arrow")
        writer = None
        tables = stream(
            file.path, file.format, file.caption_col, columns, text_format, file.lists, most=left, remarks=remarks
        )
        for table in tables:
            table = table if left is None else table.slice(0, left - rows)
            for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
                for piece in in_reach(batch):
                    plain = pa.table([decoded(column) for column in piece.columns], names=piece.schema.names)
                    plain = plain.replace_schema_metadata(MARK)
                    writer = writer or pa.ipc.new_file(path, plain.schema, options=_ZSTD)
                    writer.write_table(plain)
            rows += table.num_rows
            if rows == left:
                break
        if writer is None:
            return replace(file, rows=0)
        writer.close()
        sealed[name] = Seal.of(path)
        staging.put(name, path)
    return replace(file, rows=rows, staged=name)


def _shards(files: list[CaptionFile], taken: list[int], rows_per_shard: int) -> pa.Table:
    starts = [np.arange(0, rows, rows_per_shard, dtype=np.int64) for rows in taken]
    index = np.repeat(np.arange(len(files)), [len(part) for part in starts])
    start = np.concatenate(starts)
    count = np.minimum(np.asarray(taken)[index] - start, rows_per_shard)
    paths = pa.array([file.path for file in files], pa.string()).take(pa.array(index))
    unknown = pa.array(np.zeros(len(index), np.uint64))  # digests: known once the rows are read, and the plan is saved
    columns = [np.arange(len(index)), paths, index, start, count, unknown, unknown]
    return pa.table(columns, names=SHARDS.names).cast(SHARDS)
