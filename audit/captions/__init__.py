"""Captions in: any list of files, folders or data sets becomes shards of rows with equal captions found.

find.py        which inputs there are, and which files are left out
files.py       what is in them, which column the captions are, whether they are whole
text_lines.py  text files: how they are written, their lines unpacked and decoded
csv_rows.py    CSV and TSV; json_rows.py  JSON
remarks.py     what is legal in them and perhaps not meant
streams.py     text files, Arrow streams, lists of captions and data sets, read front to back
rows.py        Parquet and Arrow files, read by position
values.py      columns of any type as captions
carried.py     which other columns go along, and their one type over all files
hashes.py      captions as 64-bit hashes
repeats.py     equal ones, found on disk
sample.py      which captions the null maps are made of
plan.py        shards and duplicates, kept in the run folder; what was found, for people
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pyarrow as pa

from audit.base.errors import AuditError, Damaged
from audit.base.storage import Folder
from audit.captions.files import CaptionFile
from audit.captions.find import find_captions
from audit.captions.hashes import captions_digest
from audit.captions.plan import (
    AUTO,
    MOST_SECONDS,
    CaptionPlan,
    PlanFacts,
    auto_rows_per_shard,
    describe_captions,
    plan_captions,
    rows_in_time,
)
from audit.captions.rows import Rows
from audit.captions.sample import SAMPLE
from audit.captions.text_lines import QUOTINGS, TextFormat
from audit.captions.values import caption_text, is_empty, text

__all__ = [
    "AUTO",
    "MOST_SECONDS",
    "QUOTINGS",
    "SAMPLE",
    "CaptionFile",
    "CaptionPlan",
    "PlanFacts",
    "TextFormat",
    "auto_rows_per_shard",
    "describe_captions",
    "find_captions",
    "is_empty",
    "plan_captions",
    "read_captions",
    "read_shard",
    "rows_in_time",
]


SHARD_BYTES = (1 << 31) - 1  # what one Arrow string array holds


def read_shard(plan: CaptionPlan, shard: int, staging: Folder, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard: `caption` (string, null where there is none), then the columns that are carried through.

    Bytes that are not UTF-8 are replaced by U+FFFD. Reading shards in order decodes every row once.

    Args:
        plan: the plan.
        shard: shard_id.
        staging: the folder given to `plan_captions`.
        columns: some of `plan.keep_cols`; None for all.

    Raises:
        AuditError: the file, or its captions, are not those that were planned, or are more than a shard can hold.
        Damaged: a staged copy is not what was planned.
        OSError, pyarrow.ArrowException: it cannot be read.
    """
    fields = [plan.keep_schema.field(name) for name in (plan.keep_cols if columns is None else columns)]
    row = plan.shards.slice(shard, 1).to_pylist()[0]
    rows = _open(plan.files[row["file_index"]], staging.url, tuple(field.name for field in fields))
    file, end = plan.files[row["file_index"]], row["row_start"] + row["row_count"]
    table = rows.read(row["row_start"], row["row_count"])
    if table.column(0).nbytes > SHARD_BYTES:
        raise AuditError(
            f"{file.path}: rows {row['row_start']} to {end - 1} hold more captions than a shard can "
            f"({table.column(0).nbytes / 2**30:.1f} GiB): begin another run with fewer --rows-per-shard"
        )
    arrays = [caption_text(table.column(0))]
    if captions_digest(arrays[0]) != row["captions_xxh3"]:
        if file.staged:
            raise Damaged(
                f"{staging.path(file.staged)}: damaged: be-audit verify {staging.url} --repair makes it again"
            )
        raise AuditError(f"{file.path}: changed since it was planned: rows {row['row_start']} to {end - 1} are others")
    for place in fields:
        if place.name not in table.schema.names[1:]:
            arrays.append(pa.nulls(table.num_rows, place.type))
        elif pa.types.is_string(place.type):
            arrays.append(text(table[place.name]))
        else:
            arrays.append(table[place.name].cast(place.type))
    return pa.table(arrays, schema=pa.schema([("caption", pa.string()), *fields]))


def read_captions(plan: CaptionPlan, row_ids: Sequence[int], staging: Folder) -> list[str]:
    """The captions of some rows of a plan, in the order given; arguments and errors as of `read_shard`."""
    found: dict[int, str] = {}
    for shard in sorted({row >> 32 for row in row_ids}):
        captions = read_shard(plan, shard, staging, [])["caption"]
        found |= {row: captions[row & 0xFFFFFFFF].as_py() for row in row_ids if row >> 32 == shard}
    _open.cache_clear()  # who reads them next identifies them again
    return [found[row] for row in row_ids]


@functools.lru_cache(maxsize=4)
def _open(file: CaptionFile, staging: str, columns: tuple[str, ...]) -> Rows:
    return Rows(file, staging, columns)
