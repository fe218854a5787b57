"""Read a run's results: committed files only, with every duplicate row given the scores of its first occurrence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from audit.commits import Ledger
from audit.run import Run, Stage
from audit.schema import DETECTORS, WINDOWS

RESOLVED = ("status", "error", "num_tokens", "truncated", *DETECTORS, "ld_std", "refined", *WINDOWS)
"""Score columns that a duplicate row takes from its first occurrence."""


def committed_files(ledger: Ledger, shards: Sequence[int] | None = None) -> list[str]:
    """Paths of a stage's committed files, of all shards or some, in shard order."""
    done = ledger.done(shards)
    return [ledger.folder.path(done[shard].file) for shard in sorted(done)]


def dataset(run: Run, stage: str = "scan", shards: Sequence[int] | None = None) -> pads.Dataset | None:
    """The committed files of a stage, of all shards or some, as a pyarrow dataset; None while there are none."""
    ledger = run.scan if stage == "scan" else getattr(Stage.find(run, stage), "ledger", None)
    files = committed_files(ledger, shards) if ledger else []
    if not files:
        return None
    fs = run.folder.fs
    filesystem = None if run.folder.local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs))
    return pads.dataset(files, format="ipc", filesystem=filesystem)


def read_rows(run: Run, row_ids: NDArray[np.int64], columns: Sequence[str] | None = None) -> pa.Table:
    """Scanned rows by id, in the order given, from the files that hold them: refined, duplicates left as stored.

    Text is read for chosen rows only: a whole column of 10^8 captions does not fit an Arrow string array to be sorted.

    Args:
        run: the run. row_ids: [n], of committed shards. columns: names to keep; None for all but the masks.

    Returns:
        n rows.
    Raises:
        KeyError: none of their shards is committed.
    """
    found = dataset(run, shards=np.unique(row_ids >> 32).tolist() if len(row_ids) else None)
    if found is None:
        raise KeyError("rows of shards that are not committed")
    if columns is None:
        columns = [name for name in found.schema.names if name != "mask"]
    needed = [name for name in found.schema.names if name in {*columns, "row_id"}]
    table = found.to_table(columns=needed, filter=pc.field("row_id").isin(pa.array(row_ids)))
    table = table.take(pc.index_in(pa.array(row_ids), table["row_id"].combine_chunks()))
    return _add_refined(run, table).select(list(columns))


def read_stage(run: Run, stage: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """All rows of a stage in shard order, some columns or all; None when it has none."""
    found = dataset(run, stage)
    return None if found is None else found.to_table(columns=None if columns is None else list(columns))


def read_scores(run: Run, columns: Sequence[str] | None = None, masks: bool = False) -> pa.Table:
    """Every scanned row with duplicates and refinement resolved, in row order.

    A duplicate row gets status and scores of its first occurrence where that one is committed; until then its scores
    are null and its status is `pending`. Columns of a refined row come from its trajectories.

    Args:
        run: the run.
        columns: names to keep; None for all but the masks.
        masks: with the `mask` column (null in duplicate rows: take their first occurrence's).

    Raises:
        AuditError: nothing is committed yet.
    """
    from audit.errors import AuditError

    found = dataset(run)
    if found is None:
        raise AuditError(f"{run.url}: no shard is done yet: go on with `be-audit scan`")
    if columns is None:
        columns = [name for name in found.schema.names if masks or name != "mask"]
    needed = {*columns, "row_id", "duplicate_of"}  # by which rows are resolved; nothing else is read
    table = found.to_table(columns=[name for name in found.schema.names if name in needed])
    return resolve_duplicates(_add_refined(run, table)).select(list(columns))


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


def _add_refined(run: Run, table: pa.Table) -> pa.Table:
    """Fill `refined` and the trajectory windows of refined rows: means over their images."""
    windows = [name for name in WINDOWS if name in table.schema.names]
    if not {*windows, "refined"} & {*table.schema.names}:
        return table
    found = read_stage(run, "refine", ["row_id", "error", *windows])
    found = None if found is None else found.filter(pc.is_null(found["error"]))
    if found is None or not found.num_rows:
        return table
    means = found.group_by("row_id").aggregate([(name, "mean") for name in windows])
    ids, order = table["row_id"].to_numpy(), np.argsort(means["row_id"].to_numpy())
    known = means["row_id"].to_numpy()[order]
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    refined = known[at] == ids
    places = pa.array(order[at], mask=~refined)
    for name in windows:
        column = pc.coalesce(means[f"{name}_mean"].cast(pa.float32()).take(places), table[name])
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    if "refined" not in table.schema.names:
        return table
    flags = pc.or_(table["refined"], pa.array(refined))
    return table.set_column(table.schema.get_field_index("refined"), table.schema.field("refined"), flags)
