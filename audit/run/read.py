"""Read a run's results: committed files only, with duplicates, second looks and refinement resolved in one way.

- A row whose caption occurred before has the scores of that first row (columns RESOLVED); until that one is committed
  its status is `pending`.
- A row that had a second look has its scores (columns LOOKED_AT), means over more noises; `num_noises` says how many.
  One that is null there stays null: the first look's is of fewer noises.
- The scores that take a trajectory (WINDOWS), where a second look has none, are those of the row's own trajectories
  where some were sampled: by `--refine`, else by confirm; means over their images. `refined` says they are of the
  scan's own job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from audit.base.commits import damaged
from audit.base.errors import AuditError
from audit.run.run import Run
from audit.run.schema import (
    DETECTORS,
    LOOKED_AT,
    SCORE_COLUMNS,
    SCORE_MASKS,
    SECOND_LOOK_COLUMNS,
    TRAJECTORY_COLUMNS,
    WINDOWS,
)
from audit.run.stage import REFINE, SCAN, SECOND_LOOK, STAGES, TRAJECTORIES, Stage, StageKind

RESOLVED = ("status", "error", "num_tokens", "truncated", *DETECTORS, "ld_std", "num_noises", "refined", *WINDOWS)
"""Score columns that a duplicate row takes from its first occurrence."""
PART_ROWS = 1 << 20
_COLUMNS = {SCAN: SCORE_COLUMNS, SECOND_LOOK: SECOND_LOOK_COLUMNS} | dict.fromkeys(
    (REFINE, TRAJECTORIES), TRAJECTORY_COLUMNS
)  # of stages whose rows have scores


def dataset(run: Run, kind: StageKind = SCAN, shards: Sequence[int] | None = None) -> pads.Dataset | None:
    """The committed files of a stage, of all shards or some, as a pyarrow dataset; None while there are none.

    Sizes are compared with the commits, contents are not: hashing is for those who read shards whole (Stage.table) and
    for verify.

    Raises:
        Damaged: a commit cannot be read, or its file is not there or of another size: its rows would be left out.
    """
    stage = Stage.find(run, kind)
    done = stage.ledger.whole(stage.shards if shards is None else shards) if stage else {}
    files = [run.folder.path(stage.file(shard)) for shard in done] if stage else []
    if not files:
        return None
    fs = run.folder.fs
    filesystem = None if run.folder.local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs))
    with damaged(run.url):
        found = pads.dataset(files, format="ipc", filesystem=filesystem)
    # a detector that is younger than the run, or than some of its shards, has nulls there
    columns = _COLUMNS.get(kind, {})
    late = (*DETECTORS, "num_noises")
    younger = [(name, columns[name][0]) for name in late if name in columns and name not in found.schema.names]
    return (
        found.replace_schema(pa.schema([*found.schema, *(pa.field(*each) for each in younger)])) if younger else found
    )


def take_rows(run: Run, found: pads.Dataset, columns: Sequence[str] | None, filter: Any = None) -> pa.Table:
    """Rows of a dataset of a run. Raises Damaged where a file has been cut or changed since it was committed."""
    with damaged(run.url):
        return found.to_table(columns=None if columns is None else list(columns), filter=filter)


def read_rows(
    run: Run,
    row_ids: NDArray[np.int64],
    columns: Sequence[str] | None = None,
    first_look: bool = False,
    confirmed: bool = True,
) -> pa.Table:
    """Scanned rows by id, in the order given, from the files that hold them: refined, duplicates left as stored.

    Text is read for chosen rows only: a whole column of 10^8 captions does not fit an Arrow string array to be sorted.

    Args:
        run: the run. row_ids: [n], of committed shards. columns: names to keep; None for all but the masks.
        first_look: what the scan's own files say, nothing of later stages. confirmed: with what confirm's trajectories
            tell of WINDOWS.

    Returns:
        n rows.
    Raises:
        KeyError: none of their shards is committed.
    """
    found = dataset(run, shards=np.unique(row_ids >> 32).tolist() if len(row_ids) else None)
    if found is None:
        raise KeyError("rows of shards that are not committed")
    if columns is None:
        columns = [name for name in found.schema.names if name not in SCORE_MASKS]
    needed = [name for name in found.schema.names if name in {*columns, "row_id"}]
    table = take_rows(run, found, needed, pc.field("row_id").isin(pa.array(row_ids)))
    table = table.take(pc.index_in(pa.array(row_ids), table["row_id"].combine_chunks()))
    if not first_look:
        table = _Later(run, needed, False, confirmed, row_ids).added(table)
    return table.select(list(columns))


def read_stage(run: Run, stage: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """All rows of a stage (`scan`, `refine`, `trajectories`, `confirm`, `mitigate`) in shard order; None without any.

    Args:
        run: the run. stage: its name. columns: some of them; None for all.
    """
    found = dataset(run, STAGES[stage])
    return None if found is None else take_rows(run, found, columns)


def read_scores(
    run: Run,
    columns: Sequence[str] | None = None,
    masks: bool = False,
    first_look: bool = False,
    confirmed: bool = True,
) -> pa.Table:
    """Every scanned row with duplicates, second looks and refinement resolved, in row order.

    A duplicate row gets status and scores of its first occurrence where that one is committed; until then its scores
    are null and its status is `pending`.

    Args:
        run: the run.
        columns: names to keep; None for all but the masks.
        masks: with the mask columns (null in duplicate rows: take their first occurrence's); always of the first look.
        first_look: leave out what a second look found. confirmed: with what confirm's trajectories tell of WINDOWS.

    Raises:
        AuditError: nothing is committed yet.
    """
    found = _scanned(run)
    if columns is None:
        columns = [name for name in found.schema.names if masks or name not in SCORE_MASKS]
    keys = {"row_id", "duplicate_of"}  # by which rows are resolved; nothing else is read
    needed = [name for name in found.schema.names if name in {*columns, *keys}]
    table = take_rows(run, found, needed)
    return resolve_duplicates(_Later(run, needed, first_look, confirmed).added(table)).select(list(columns))


def read_distinct(run: Run, columns: Sequence[str], first_look: bool = False) -> pa.Table:
    """The rows that were scored themselves, ok and no duplicate, in row order; no other is ever in memory.

    Args:
        run: the run. columns: names to keep. first_look: leave out what a second look found.

    Raises:
        AuditError: nothing is committed yet.
    """
    return pa.concat_tables(distinct_parts(run, columns, first_look))


def distinct_parts(
    run: Run, columns: Sequence[str], first_look: bool = False, confirmed: bool = True
) -> Iterator[pa.Table]:
    """The same rows in parts of some PART_ROWS, at least one, which may be empty: for who needs no more of them.

    Args:
        confirmed: with what confirm's trajectories tell of WINDOWS: not where a confirm must choose the same rows
            twice, nor where a threshold is of the scan's own scores.
    """
    found = _scanned(run)
    own = (pc.field("status") == "ok") & pc.field("duplicate_of").is_null()
    needed = [name for name in found.schema.names if name in {*columns, "row_id"}]
    later = _Later(run, needed, first_look, confirmed)

    def part(batches: list[pa.RecordBatch]) -> pa.Table:
        schema = pa.schema([found.schema.field(name) for name in needed])
        return later.added(pa.Table.from_batches(batches, schema)).select(list(columns))

    held, count, given = list[pa.RecordBatch](), 0, False
    with damaged(run.url):
        for batch in found.to_batches(columns=needed, filter=own):
            held.append(batch)
            count += batch.num_rows
            if count >= PART_ROWS:
                yield part(held)
                held, count, given = [], 0, True
        if held or not given:
            yield part(held)


def read_repeats(run: Run, row_ids: NDArray[np.int64]) -> pa.Table:
    """Every row with the caption of some first occurrences, these included: row_id and `first`, theirs; in row order.

    Args:
        run: the run. row_ids: of first occurrences.
    """
    ids = pa.array(row_ids, pa.int64())
    like = pc.field("row_id").isin(ids) | pc.field("duplicate_of").isin(ids)
    found = take_rows(run, _scanned(run), ["row_id", "duplicate_of"], like)
    first = pc.coalesce(found["duplicate_of"], found["row_id"])
    return pa.table({"row_id": found["row_id"], "first": first}).sort_by("row_id")


def count_rows(run: Run) -> dict[str, int]:
    """Rows of the committed shards by status, duplicates resolved (ok, error, empty, pending), then `rows` and
    `duplicates`: a pass over two columns that holds none of them.
    """
    found, counts = _scanned(run), Counter(dict.fromkeys(("ok", "error", "empty", "pending", "rows", "duplicates"), 0))
    failed = take_rows(run, found, ["row_id"], pc.field("status") == "error")["row_id"].combine_chunks()
    stage = Stage.find(run, SCAN)
    done = pa.array(sorted(stage.ledger.whole(stage.shards)) if stage else [], pa.int64())
    with damaged(run.url):
        for batch in found.to_batches(columns=["status", "duplicate_of"]):
            of = batch["duplicate_of"].drop_null()
            own = batch["status"].filter(pc.is_null(batch["duplicate_of"]))
            counts.update({each["values"]: each["counts"] for each in pc.value_counts(own).to_pylist()})
            pending = len(of) - (pc.sum(pc.is_in(pc.shift_right(of, pa.scalar(32, of.type)), done)).as_py() or 0)
            error = pc.sum(pc.is_in(of, failed)).as_py() or 0
            counts.update(ok=len(of) - pending - error, error=error, pending=pending)
            counts.update(rows=batch.num_rows, duplicates=len(of))
    return dict(counts)


def _scanned(run: Run) -> pads.Dataset:
    found = dataset(run)
    if found is None:
        raise AuditError(f"{run.url}: no shard is done yet: go on with `be-audit scan`")
    return found


def resolve_duplicates(table: pa.Table) -> pa.Table:
    """Give every row with a `duplicate_of` what its first occurrence has (columns RESOLVED)."""
    of = table["duplicate_of"].combine_chunks()
    if isinstance(of, pa.ChunkedArray):
        of = of.chunk(0) if of.num_chunks else pa.array([], pa.int64())
    rows = np.flatnonzero(pc.is_valid(of).to_numpy(zero_copy_only=False))
    if not len(rows):
        return table
    ids = table["row_id"].to_numpy()
    wanted = of.take(pa.array(rows)).to_numpy(zero_copy_only=False)
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, wanted, sorter=order)
    there = (at < len(ids)) & (ids[order[np.minimum(at, len(ids) - 1)]] == wanted)
    source = np.arange(len(ids))
    source[rows[there]] = order[at[there]]
    missing = np.zeros(len(ids), bool)
    missing[rows[~there]] = True
    for name in (name for name in RESOLVED if name in table.schema.names):
        column = table[name].take(pa.array(source))
        if missing.any():
            gap = pa.scalar("pending") if name == "status" else pa.scalar(None, table.schema.field(name).type)
            column = pc.if_else(pa.array(missing), gap, column)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table


def window_means(run: Run, confirmed: bool = True, rows: NDArray[np.int64] | None = None) -> pa.Table | None:
    """Scores that take a trajectory, means over the images of a row: row_id, refined, WINDOWS. None without any.

    `refined`: the trajectories are those of `--refine`; rows that only confirm sampled come after them.

    Args:
        confirmed: with those that confirm sampled. rows: ids of some rows; None for all.
    """
    parts: list[pa.Table] = []
    for kind in (REFINE, TRAJECTORIES) if confirmed else (REFINE,):
        found = dataset(run, kind)
        if found is None:
            continue
        table = take_rows(run, found, ["row_id", *WINDOWS], _sound(rows))
        if parts:
            table = table.filter(pc.invert(pc.is_in(table["row_id"], parts[0]["row_id"].combine_chunks())))
        means = table.group_by("row_id").aggregate([(name, "mean") for name in WINDOWS])
        columns = {name: means[f"{name}_mean"].cast(pa.float32()) for name in WINDOWS}
        refined = pa.array(np.full(means.num_rows, kind is REFINE))
        parts.append(pa.table({"row_id": means["row_id"], "refined": refined, **columns}))
    return pa.concat_tables(parts) if parts else None


def second_looks(
    run: Run, columns: Sequence[str] = LOOKED_AT, rows: NDArray[np.int64] | None = None
) -> pa.Table | None:
    """Rows of the second look that could be scored: row_id and some of LOOKED_AT. None without any.

    Args:
        rows: ids of some rows; None for all.
    """
    found = dataset(run, SECOND_LOOK)
    return None if found is None else take_rows(run, found, ["row_id", *columns], _sound(rows))


def _sound(rows: NDArray[np.int64] | None) -> Any:
    """A filter: rows without an error, all or some."""
    sound = pc.field("error").is_null()
    return sound if rows is None else sound & pc.field("row_id").isin(pa.array(rows, pa.int64()))


class _Later:
    """What later stages found, for tables of a scan's rows: trajectories, and over them second looks.

    Args:
        names: columns of the tables. first_look: leave out what a second look found. confirmed: with what confirm's
        trajectories tell. rows: ids of the rows to come; None for all.
    """

    def __init__(
        self,
        run: Run,
        names: Sequence[str],
        first_look: bool,
        confirmed: bool,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        looked = [name for name in LOOKED_AT if name in names]
        self._looks = _by_row(second_looks(run, looked, rows) if looked and not first_look else None)
        sampled = any(name in names for name in ("refined", *WINDOWS))
        self._means = _by_row(window_means(run, confirmed, rows) if sampled else None)

    def added(self, table: pa.Table) -> pa.Table:
        """A table of rows with it; it has `row_id`."""
        for found in (self._means, self._looks):
            if found is None:
                continue
            ids, wanted = found["row_id"].to_numpy(), table["row_id"].to_numpy()
            at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
            known = ids[at] == wanted
            places = pa.array(at, mask=~known)
            for name in (name for name in found.schema.names if name in table.schema.names and name != "row_id"):
                column = found[name].take(places)
                if name == "refined":
                    column = pc.or_(table[name], pc.fill_null(column, False))
                elif name in WINDOWS:
                    column = pc.coalesce(column, table[name])
                else:
                    column = pc.if_else(pa.array(known), column, table[name])
                table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        return table


def _by_row(found: pa.Table | None) -> pa.Table | None:
    """Sorted by row_id; None for nothing."""
    return found.sort_by("row_id").combine_chunks() if found is not None and found.num_rows else None
