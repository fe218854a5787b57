"""The rows a report is about: confirm's candidates with their verdicts, and the best-scored rows beyond them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.base.identity import source_columns
from audit.reports.groups import group_captions
from audit.run.read import count_rows, dataset, distinct_parts, read_repeats, read_rows
from audit.run.run import Run
from audit.run.schema import (
    CONFIRMED_COLUMNS,
    COPIES,
    MATCH_COLUMNS,
    SCORE_COLUMNS,
    SCORE_MASKS,
    VERDICTS,
)
from audit.run.select import best_scores, check_score, exceeds, rows_of, unlooked
from audit.run.stage import CONFIRM, TRAJECTORIES, Stage
from audit.statistics.multiple import q_values
from audit.verdicts.candidates import TrajectoriesFingerprint

DEFAULT_FRACTION, DEFAULT_TOP_K = 0.1, 1000  # listed without a threshold: this part of the captions, at most so many
MOST = 50_000  # rows a report lists, at most: what its table was built for
_OF_SCORES = [name for name in SCORE_COLUMNS if name not in ("row_id", "caption", "status", "error", *SCORE_MASKS)]
_OF_VERDICT = ("verdict", "verdict_images", "num_images", "p_value")
_OF_BEST = [name for name in MATCH_COLUMNS if name != "verdict"]

FLAGGED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": SCORE_COLUMNS["row_id"],
    "caption": (pa.string(), "the caption"),
    "score": (pa.float32(), "the score rows are ranked by; `score_name` says which"),
    "score_name": (pa.string(), "name of that score column"),
    **{name: CONFIRMED_COLUMNS[name] for name in _OF_VERDICT},
    "q_value": (
        pa.float32(),
        "Benjamini-Hochberg q-value: of the candidates with at most this q, at most this share is expected to be false",
    ),
    "occurrences": (pa.int64(), "rows of the run with this caption, itself included"),
    "template": (pa.string(), "what the caption shares with the others of its group, or the caption itself"),
    "template_captions": (pa.int32(), "flagged captions in that group"),
    "source_url": (pa.string(), "URL the caption came with, where the run kept one"),
    "source_key": (pa.string(), "key the caption came with, where the run kept one"),
    "input_file": (pa.string(), "caption file the row was read from"),
    "input_row": (pa.int64(), "its row there, 0 the first"),
    **{name: SCORE_COLUMNS[name] for name in _OF_SCORES if name != "duplicate_of"},
    **{f"best_{name}": (kind, f"match the verdict rests on: {text}") for name, (kind, text) in MATCH_COLUMNS.items()},
}
del FLAGGED_COLUMNS["best_verdict"]
"""Columns of the flagged table; the input's own that were carried through follow (as `input_NAME` on a clash)."""

DENY_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "source": (pa.string(), "caption: a row of the caption list; picture: a training picture that was matched"),
    "key": (pa.string(), "key of the row or picture, where there is one"),
    "url": (pa.string(), "URL of the row or picture, where there is one"),
    "caption": (pa.string(), "its caption"),
    "verdict": (pa.string(), "global or local; null where confirm has not run"),
    "row_id": (pa.int64(), "the caption's row; of a picture, the row that reproduces it"),
    "input_file": (pa.string(), "caption file of the row"),
    "input_row": (pa.int64(), "its row there, 0 the first"),
}
"""Columns of the deny list: what to drop from a training set."""

CANDIDATE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "url": (pa.string(), "URL the caption came with"),
    "caption": (pa.string(), "the caption"),
    "key": (pa.string(), "key the caption came with, where the run kept one"),
    "uid": (pa.string(), "the same: img2dataset gives `key` a number of its own"),
}
"""Columns of the list of URLs that img2dataset takes as it is."""


@dataclass(frozen=True)
class Flagged:
    """What was selected.

    Attributes:
        table: FLAGGED_COLUMNS and the carried columns: global, local, then the others; of a verdict the smallest
            q-value first where there is one, then the best-scored.
        deny: DENY_COLUMNS.
        scores: of all scored distinct captions by `by`, float32, best first.
        by: score column. threshold: what rows had to exceed, None when the best `top_k` were taken.
        above: scored captions above the threshold. taken: how many of them were taken, the best, beside candidates.
        candidates: CANDIDATE_COLUMNS; no rows where the run kept no URLs.
        counts: rows of the committed shards by status after duplicates are resolved, and distinct scored captions.
        unlooked: captions that the threshold passes over, since they had no second look (`select.unlooked`).
    """

    table: pa.Table
    deny: pa.Table
    scores: np.ndarray
    by: str
    threshold: float | None
    above: int
    taken: int
    counts: dict[str, int]
    candidates: pa.Table
    unlooked: int = 0


def find_flagged(
    run: Run, by: str, threshold: float | None, top_k: int | None, num_noises: int | None = None, confirmed: bool = True
) -> Flagged:
    """Select the rows of a report.

    Args:
        run: the run, finished or not.
        by: score column.
        threshold: take rows scored above it.
        num_noises: with a threshold, only rows whose scores are means over so many noises.
        top_k: take this many at most; None for DEFAULT_FRACTION and DEFAULT_TOP_K, or MOST with a threshold.
        confirmed: by what confirm's images tell as well, which a calibrated threshold does not hold for.

    Raises:
        AuditError: nothing committed yet, or no values in that column.
    """
    verdicts = read_verdicts(run)
    suspects, distinct, above = _suspects(run), 0, 0
    values, candidates = list[np.ndarray](), list[np.ndarray]()
    for part in distinct_parts(run, ["row_id", check_score(by), "num_noises"], confirmed=confirmed):
        scores, ids = part[by].to_numpy(), part["row_id"].to_numpy()
        values.append(scores[np.isfinite(scores)])
        candidates.append(ids[np.isin(ids, suspects)])
        distinct += part.num_rows
        if threshold is not None:
            able = exceeds(part[by], threshold)
            if num_noises is not None:
                able = pc.and_kleene(able, pc.equal(part["num_noises"], num_noises))
            above += pc.sum(able).as_py() or 0
    valid = sum(map(len, values))
    if not valid and distinct:
        raise AuditError(f"--by {by}: the run has no scores in this column")
    if threshold is None:
        above = valid if top_k is not None else min(rows_of(DEFAULT_FRACTION, valid), DEFAULT_TOP_K)
    taken = min(above, MOST if top_k is None else top_k)
    ids = np.concatenate(candidates)
    if taken:
        noises = None if threshold is None else num_noises
        best = best_scores(run, by, taken, threshold=threshold, num_noises=noises, confirmed=confirmed)
        ids = np.union1d(best["row_id"].to_numpy(), ids)
    repeats = read_repeats(run, ids)
    rows = read_rows(run, ids, confirmed=confirmed).sort_by([(by, "descending"), ("row_id", "ascending")])
    table = _flagged_table(run, rows, repeats, by, verdicts)
    counts = {**count_rows(run), "distinct": distinct}
    deny = deny_list(run, repeats, table, verdicts is not None)
    urls = url_list(run, repeats, table)
    beyond = 0 if threshold is None else unlooked(run, by, threshold, num_noises)
    ordered = np.sort(np.concatenate(values))[::-1]
    return Flagged(table, deny, ordered, by, threshold, above, taken, counts, urls, beyond)


def _suspects(run: Run) -> np.ndarray:
    """row_ids of confirm's candidates, which a report lists whatever they score."""
    begun = Stage.find(run, TRAJECTORIES)
    if begun is None:
        return np.zeros(0, np.int64)
    found: np.ndarray = begun.items.filter(pc.invert(begun.items["clean"]))["row_id"].unique().to_numpy()
    return found


def read_verdicts(run: Run) -> pa.Table | None:
    """Confirm's verdicts without pictures: CONFIRMED_COLUMNS up to p_value, `best_*`, `q_value`. None without any."""
    found = dataset(run, CONFIRM)
    if found is None:
        return None
    plain = [name for name in CONFIRMED_COLUMNS if name not in ("best", "matches")]
    columns = {name: pc.field(name) for name in plain}
    columns |= {f"best_{name}": pc.field("best", name) for name in _OF_BEST}
    table = found.to_table(columns=columns)
    q = pa.array(q_values(table["p_value"].to_pylist()), pa.float32(), from_pandas=True)
    return table.append_column("q_value", q)


def picked_by(run: Run) -> str | None:
    """The score confirm picked its candidates by; None without a confirm."""
    stage = Stage.find(run, TRAJECTORIES)
    return stage.fingerprint(TrajectoriesFingerprint).by if stage else None


def _flagged_table(run: Run, rows: pa.Table, repeats: pa.Table, by: str, verdicts: pa.Table | None) -> pa.Table:
    """Rows of scores/ (best first) as the flagged table."""
    ids, times = np.unique(repeats["first"].to_numpy(), return_counts=True)
    wanted = rows["row_id"].to_numpy()
    arrays: dict[str, pa.ChunkedArray | pa.Array] = {name: rows[name] for name in ("row_id", "caption", *_OF_SCORES)}
    arrays |= _input_places(run, wanted)
    arrays["score"], arrays["score_name"] = arrays[by], pa.array([by] * rows.num_rows, pa.string())
    arrays["occurrences"] = pa.array(times[np.searchsorted(ids, wanted)], pa.int64())
    groups = group_captions(rows["caption"].to_pylist())
    of = np.array(groups.of, np.int64)
    arrays["template"] = pa.array(groups.labels, pa.string()).take(pa.array(of))
    arrays["template_captions"] = pa.array(np.bincount(of)[of] if len(of) else of, pa.int32())
    kept = [name for name in rows.schema.names if name not in SCORE_COLUMNS]
    url, key = source_columns(kept)
    for name, column in (("source_url", url), ("source_key", key)):
        arrays[name] = rows[column].cast(pa.string()) if column else pa.nulls(rows.num_rows, pa.string())
    if verdicts is not None:
        at = pc.index_in(rows["row_id"].combine_chunks(), verdicts["row_id"].combine_chunks())
        names = [name for name in verdicts.schema.names if name in FLAGGED_COLUMNS and name not in arrays]
        arrays |= {name: verdicts[name].take(at) for name in names}
    fields, columns = [], []
    for name, (kind, text) in FLAGGED_COLUMNS.items():
        fields.append(pa.field(name, kind, metadata={"description": text}))
        columns.append(arrays[name].cast(kind) if name in arrays else pa.nulls(rows.num_rows, kind))
    for name in kept:
        shown = f"input_{name}" if name in FLAGGED_COLUMNS else name
        fields.append(pa.field(shown, rows[name].type, metadata={"description": f"column {name} of the caption file"}))
        columns.append(rows[name])
    table = pa.table(columns, schema=pa.schema(fields))
    place = pc.fill_null(pc.index_in(table["verdict"], pa.array(VERDICTS)), len(VERDICTS)).to_numpy()
    copied = pc.is_in(table["verdict"], pa.array(COPIES))
    q = pc.fill_null(pc.if_else(copied, table["q_value"], None), 1.0).to_numpy()
    return table.take(pa.array(np.lexsort((np.arange(len(place)), q, place))))


def _input_places(run: Run, row_ids: np.ndarray) -> dict[str, pa.Array]:
    """Where rows were read from: input_file and input_row."""
    shards = run.plan.shards
    shard = row_ids >> 32
    starts = shards["row_start"].to_numpy()[shard] if len(row_ids) else row_ids
    return {
        "input_file": shards["input_file"].combine_chunks().take(pa.array(shard)),
        "input_row": pa.array(starts + (row_ids & 0xFFFFFFFF), pa.int64()),
    }


def deny_list(run: Run, repeats: pa.Table, flagged: pa.Table, confirmed: bool) -> pa.Table:
    """What to drop: every row with a reproduced caption, and every training picture that was reproduced.

    Args:
        repeats: rows with flagged captions (`read_repeats`). flagged: the flagged table.
        confirmed: there are verdicts; only global and local ones count then, else every flagged caption does.
    """
    if confirmed:
        flagged = flagged.filter(pc.is_in(flagged["verdict"], pa.array(COPIES)))
    ids = flagged["row_id"].combine_chunks()
    carried = source_columns(list(run.plan.keep_schema.names))
    wanted = ["row_id", "duplicate_of", "caption", *(name for name in carried if name)]
    rows = read_rows(run, _rows_like(repeats, ids), wanted)
    first = pc.coalesce(rows["duplicate_of"], rows["row_id"]).combine_chunks()
    url, key = carried
    none = pa.nulls(rows.num_rows, pa.string())
    captions = {
        "source": pa.array(["caption"] * rows.num_rows, pa.string()),
        "key": rows[key].cast(pa.string()) if key else none,
        "url": rows[url].cast(pa.string()) if url else none,
        "caption": rows["caption"],
        "verdict": flagged["verdict"].take(pc.index_in(first, ids)),
        "row_id": rows["row_id"],
        **_input_places(run, rows["row_id"].to_numpy()),
    }
    schema = pa.schema([pa.field(n, k, metadata={"description": text}) for n, (k, text) in DENY_COLUMNS.items()])
    tables = [pa.table([captions[name] for name in schema.names], schema=schema).sort_by("row_id")]
    pictures = copied_pictures(run)
    if pictures is not None:
        gap = {name: pa.nulls(pictures.num_rows, schema.field(name).type) for name in ("input_file", "input_row")}
        gap["source"] = pa.array(["picture"] * pictures.num_rows, pa.string())
        tables.append(pa.table([gap[name] if name in gap else pictures[name] for name in schema.names], schema=schema))
    return pa.concat_tables(tables)


def _rows_like(repeats: pa.Table, first: pa.Array) -> np.ndarray:
    """row_ids of the rows with the captions of some first occurrences."""
    found: np.ndarray = repeats.filter(pc.is_in(repeats["first"], first))["row_id"].to_numpy()
    return found


def url_list(run: Run, repeats: pa.Table, flagged: pa.Table) -> pa.Table:
    """Every URL that came with a flagged caption, repeats included, once each: what img2dataset downloads.

    Arguments as of `deny_list`.
    """
    url, key = source_columns(list(run.plan.keep_schema.names))
    schema = pa.schema([pa.field(n, k, metadata={"description": text}) for n, (k, text) in CANDIDATE_COLUMNS.items()])
    if url is None:
        return schema.empty_table()
    wanted = ["row_id", "caption", url, *([key] if key else [])]
    rows = read_rows(run, _rows_like(repeats, flagged["row_id"].combine_chunks()), wanted)
    rows = rows.filter(pc.greater(pc.binary_length(rows[url].cast(pa.string())), 0))
    _, first = np.unique(rows[url].cast(pa.string()).to_numpy(), return_index=True)
    rows = rows.take(pa.array(np.sort(first)))
    keys = rows[key].cast(pa.string()) if key else pa.nulls(rows.num_rows, pa.string())
    return pa.table([rows[url].cast(pa.string()), rows["caption"], keys, keys], schema=schema)


def copied_pictures(run: Run) -> pa.Table | None:
    """Training pictures some image was a copy of, once each, with the row and verdict of the closest match."""
    found = dataset(run, CONFIRM)
    if found is None:
        return None
    table = found.to_table(columns=["row_id", "matches"])
    matches = table["matches"].combine_chunks()
    if isinstance(matches, pa.ChunkedArray):
        matches = matches.chunk(0)
    flat = pc.list_flatten(matches)
    rows = table["row_id"].combine_chunks().take(pc.list_parent_indices(matches))
    names = ("reference_id", "reference_key", "reference_url", "reference_caption", "verdict", "sscd")
    every = pa.table({"row_id": rows, **{name: pc.struct_field(flat, name) for name in names}})
    every = every.filter(pc.is_in(every["verdict"], pa.array(COPIES)))
    every = every.sort_by([("verdict", "ascending"), ("sscd", "descending"), ("row_id", "ascending")])
    _, at = np.unique(every["reference_id"].to_numpy(), return_index=True)  # the first of each: the closest
    every = every.take(pa.array(at))
    renamed = {"reference_key": "key", "reference_url": "url", "reference_caption": "caption"}
    return every.rename_columns([renamed.get(name, name) for name in every.schema.names])
