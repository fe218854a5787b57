"""`be-audit sql`: questions to a run in SQL, answered by DuckDB over its committed files; nothing can be written.

Views: `scores` (a row an input row; duplicates, second looks and refinement resolved), `trajectories`, `confirmed`,
`matches`, `mitigated`, `commits`, `attempts`. A stage that has not begun is an empty view with its columns, so a query
works at any time. `default_score(s)` is the score by which the run's captions are picked, of a row of `scores s`.
"""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from audit.base.committed import Committed
from audit.base.errors import AuditError
from audit.base.identity import source_columns
from audit.base.text import grid
from audit.reports.export import rows_of, table_as
from audit.run.read import RESOLVED, dataset, second_looks, window_means
from audit.run.run import Run
from audit.run.schema import (
    BEST_TYPE,
    CONFIRMED_COLUMNS,
    F32,
    LOOKED_AT,
    MATCH_COLUMNS,
    MATCHES_TYPE,
    MITIGATED_COLUMNS,
    SCORE_COLUMNS,
    SCORE_MASKS,
    SCORES,
    SECOND_LOOK_COLUMNS,
    TRAJECTORY_COLUMNS,
    TRAJECTORY_MASKS,
    WINDOWS,
)
from audit.run.stage import CONFIRM, MITIGATE, REFINE, SCAN, TRAJECTORIES, Stage, StageKind
from audit.scores.second_look import default_score

_PICTURES = ("image", "image_before", "image_after", *TRAJECTORY_MASKS)  # left in the files
_COUNTS = ("ok", "error", "empty", "duplicate")
_WORKER = (("host", pa.string()), ("pid", pa.int64()), ("rank", pa.int64()))
_COMMITS = pa.schema(
    [
        ("stage", pa.string()),
        ("shard", pa.int64()),
        ("rows", pa.int64()),
        *((name, pa.int64()) for name in _COUNTS),
        ("wall_seconds", pa.float64()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("bytes", pa.int64()),
        *_WORKER,
        ("finished", pa.timestamp("s", "UTC")),
        ("file", pa.string()),
        ("sha256", pa.string()),
    ]
)
_ATTEMPTS = pa.schema(
    [
        ("stage", pa.string()),
        ("shard", pa.int64()),
        ("error", pa.string()),
        ("time", pa.timestamp("s", "UTC")),
        *_WORKER,
    ]
)


def queries() -> dict[str, str]:
    """The queries that come with be-audit: name -> SQL, whose first comment says the question."""
    folder = importlib.resources.files("sql")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return {file.name.removesuffix(".sql"): file.read_text("utf-8") for file in files}


def question(sql: str) -> str:
    """The comment a query begins with, as one line."""
    lines = []
    for line in sql.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line.lstrip("- "))
    return " ".join(lines)


def find_query(name: str) -> str:
    """SQL of a query by name, or of a file.

    Raises:
        AuditError: neither a name nor a readable file.
    """
    known = queries()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise AuditError(f"{name}: no query and no file of this name; queries: {', '.join(known)}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{name}: cannot be read as text: {error}") from error


def run_query(name: str, url: str, memory: str | None = None) -> pa.Table:
    """Answer of a query by name or file about a run, finished or not.

    Args:
        name: of a query or a file. url: of the run.
        memory: what DuckDB may hold, as `4GB`, four fifths of the machine's by default; the rest goes to a folder of
            its own in TMPDIR, which is removed.

    Raises:
        AuditError: no run, no such query, no such amount of memory, or DuckDB refuses it.
    """
    sql = find_query(name)
    run = Run.open(url)
    with tempfile.TemporaryDirectory(prefix="be-audit-sql-") as spill, connect(run, spill, memory) as connection:
        try:
            answer = connection.sql(sql)
            if answer is None:
                raise AuditError(f"{name}: has no answer: end it with a SELECT")
            return _distinct_names(answer.to_arrow_table())
        except duckdb.OutOfMemoryException as error:
            told = f"--memory {memory}" if memory else "this machine's memory and TMPDIR"
            raise AuditError(f"{name}: {told} cannot hold what the query needs: give more --memory") from error
        except duckdb.Error as error:
            raise AuditError(f"{name}: {str(error).strip()}") from error


def _distinct_names(table: pa.Table) -> pa.Table:
    """Columns that share a name numbered, as DuckDB does in a subquery: what is printed goes by name."""
    names = list[str]()
    for name in table.schema.names:
        number, free = 0, name
        while free in names or (number and free in table.schema.names):
            number += 1
            free = f"{name}_{number}"
        names.append(free)
    return table.rename_columns(names)


def connect(run: Run, spill: str | None = None, memory: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with a run's views; it can open no file, load no extension and change no setting.

    Args:
        run: the run. spill: folder for what memory is short for; none by default. memory: as of `run_query`.

    Raises:
        AuditError: an amount of memory that DuckDB does not know.
    """
    connection = duckdb.connect(":memory:")
    connection.execute("SET temp_directory=$1", [spill or ""])
    if memory is not None:
        try:
            connection.execute("SET memory_limit=$1", [memory])
        except duckdb.Error:
            raise AuditError(f"--memory {memory}: give an amount as 4GB or 500MB") from None
    connection.execute("SET autoinstall_known_extensions=false; SET autoload_known_extensions=false")
    connection.execute("SET python_enable_replacements=false")  # a table name is never a Python variable
    _scores(connection, run)
    _trajectories(connection, run)
    _confirmed(connection, run)
    _register(connection, "mitigated", run, MITIGATE, _schema(MITIGATED_COLUMNS, *_PICTURES))
    connection.register("commits", _commit_table(run))
    connection.register("attempts", _attempt_table(run))
    connection.execute("SET enable_external_access=false; SET lock_configuration=true")
    return connection


def _register(
    connection: duckdb.DuckDBPyConnection, name: str, run: Run, kind: StageKind, empty: pa.Schema
) -> list[str]:
    """Register a stage's files without pictures and tensors; returns the columns."""
    found = dataset(run, kind)
    if found is None:
        connection.register(name, empty.empty_table())
        return list(empty.names)
    plain = [field for field in found.schema if not isinstance(field.type, pa.BaseExtensionType)]
    plain = [field for field in plain if field.name not in (*SCORE_MASKS, *_PICTURES)]
    plain = [field for field in plain if not pa.types.is_float16(field.type)]  # DuckDB has no such type
    connection.register(name, found.replace_schema(pa.schema(plain)))
    return [field.name for field in plain]


def _schema(columns: dict[str, tuple[pa.DataType, str]], *without: str) -> pa.Schema:
    return pa.schema([(name, kind) for name, (kind, _) in columns.items() if name not in without])


def _scores(connection: duckdb.DuckDBPyConnection, run: Run) -> None:
    """`scores`: what `read_scores` gives, with source_url and source_key whatever the input called them."""
    empty = _schema(SCORE_COLUMNS, *SCORE_MASKS)
    keep = run.plan.keep_schema
    names = _register(connection, "_scores", run, SCAN, pa.schema([*empty, *keep]))
    _register(connection, "_refined", run, REFINE, _schema(TRAJECTORY_COLUMNS, *_PICTURES))
    windows = [("row_id", pa.int64()), ("refined", pa.bool_()), *((name, F32) for name in WINDOWS)]
    found = window_means(run)
    connection.register("_windows", pa.schema(windows).empty_table() if found is None else found)
    looks = second_looks(run)
    plain = pa.schema([("row_id", pa.int64()), *((name, SECOND_LOOK_COLUMNS[name][0]) for name in LOOKED_AT)])
    connection.register("_looks", plain.empty_table() if looks is None else looks)
    shown = []
    for name in names:
        column = f"r.{_quoted(name)}"
        if name in RESOLVED:
            column = f"CASE WHEN r.duplicate_of IS NULL THEN r.{_quoted(name)} ELSE f.{_quoted(name)} END"
        if name == "status":
            column = "CASE WHEN r.duplicate_of IS NOT NULL AND f.row_id IS NULL THEN 'pending' ELSE " + column + " END"
        elif name == "refined":
            column = f"(coalesce(t.refined, false) OR {column})"
        elif name in WINDOWS:
            column = f"coalesce(s.{name}, t.{name}, {column})"
        elif name in LOOKED_AT:
            column = f"CASE WHEN s.row_id IS NULL THEN {column} ELSE s.{_quoted(name)} END"
        shown.append(f"{column} AS {_quoted(name)}")
    # a score that is younger than the run
    shown += [f"NULL::FLOAT AS {name}" for name in SCORES if name not in names]
    url, key = source_columns(list(keep.names))
    for name, source in (("source_url", url), ("source_key", key)):
        if name not in [each.lower() for each in names]:
            shown.append(f"{f'r.{_quoted(source)}::VARCHAR' if source else 'NULL::VARCHAR'} AS {name}")
    connection.execute(f"CREATE MACRO default_score(of) AS of.{default_score(run)}")
    connection.execute(
        f"CREATE VIEW scores AS SELECT {', '.join(shown)} FROM _scores r "
        "LEFT JOIN _scores f ON r.duplicate_of = f.row_id "
        "LEFT JOIN _windows t ON t.row_id = coalesce(r.duplicate_of, r.row_id) "
        "LEFT JOIN _looks s ON s.row_id = coalesce(r.duplicate_of, r.row_id)"
    )


def _trajectories(connection: duckdb.DuckDBPyConnection, run: Run) -> None:
    """`trajectories`: confirm's and refine's, column `stage` says which."""
    empty = _schema(TRAJECTORY_COLUMNS, *_PICTURES)
    _register(connection, "_confirm_trajectories", run, TRAJECTORIES, empty)
    columns = ", ".join(empty.names)
    connection.execute(
        f"CREATE VIEW trajectories AS SELECT 'confirm' AS stage, {columns} FROM _confirm_trajectories "
        f"UNION ALL SELECT 'refine' AS stage, {columns} FROM _refined"
    )


def _confirmed(connection: duckdb.DuckDBPyConnection, run: Run) -> None:
    """`confirmed` without the picture, and `matches`, a row a comparison."""
    kinds = {"best": BEST_TYPE, "matches": MATCHES_TYPE}
    empty = pa.schema([(name, kinds.get(name, kind)) for name, (kind, _) in CONFIRMED_COLUMNS.items()])
    _register(connection, "_confirmed", run, CONFIRM, empty)
    fields = ", ".join(f"{name} := best.{name}" for name in MATCH_COLUMNS)
    plain = ", ".join(name for name in CONFIRMED_COLUMNS if name not in kinds)
    # Benjamini-Hochberg, as audit.statistics.multiple: of m p-values the smallest p m / rank from this rank upwards
    ranked = (
        "SELECT *, count(p_value) OVER () AS _m, CASE WHEN p_value IS NOT NULL THEN "
        "row_number() OVER (ORDER BY p_value NULLS LAST) END AS _rank FROM _confirmed"
    )
    connection.execute(
        f"CREATE VIEW confirmed AS SELECT {plain}, "
        "CASE WHEN p_value IS NOT NULL THEN least(1, min(p_value * _m / _rank) "
        "OVER (ORDER BY _rank DESC NULLS LAST ROWS UNBOUNDED PRECEDING)) END AS q_value, "
        f"CASE WHEN best IS NULL THEN NULL ELSE struct_pack({fields}) END AS best, matches FROM ({ranked})"
    )
    columns = ", ".join(f"m.{name} AS {name}" for name in MATCH_COLUMNS)
    connection.execute(
        f"CREATE VIEW matches AS SELECT row_id, {columns} FROM (SELECT row_id, unnest(matches) AS m FROM _confirmed)"
    )


def _commit_table(run: Run) -> pa.Table:
    return pa.concat_tables([_COMMITS.empty_table(), *(_commits_of(stage.ledger.done()) for stage in Stage.begun(run))])


def _commits_of(done: Committed) -> pa.Table:
    wall = done.took("wall")
    columns = {
        **{name: done.table[name] for name in ("shard", "rows", "bytes", "host", "pid", "rank", "sha256")},
        **{name: done.counted(name) for name in _COUNTS},
        "stage": pa.repeat(done.stage, len(done)),
        "wall_seconds": pa.array(wall.data, mask=np.ma.getmaskarray(wall)),
        "seconds": done.steps(),
        "finished": pa.array(np.floor(done.finished()).astype("datetime64[s]"), _COMMITS.field("finished").type),
        "file": pa.array(map(done.file, done), pa.string()),
    }
    return pa.table({name: columns[name] for name in _COMMITS.names}).cast(_COMMITS)


def _attempt_table(run: Run) -> pa.Table:
    """Failed tries of shards."""
    rows = []
    for ledger in (stage.ledger for stage in Stage.begun(run)):
        for shard in sorted(ledger.tried()):
            for attempt in ledger.attempts(shard):
                worker = {name: getattr(attempt.worker, name) for name, _ in _WORKER}
                told = {"error": attempt.error, "time": _time(attempt.time)}
                rows.append({"stage": ledger.stage, "shard": shard, **told, **worker})
    return pa.Table.from_pylist(rows, _ATTEMPTS)


def _time(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def answer_as(table: pa.Table, kind: str) -> bytes:
    """An answer as bytes: table (for a terminal), csv (as the report's), json (an array) or parquet."""
    if kind in ("csv", "parquet"):
        return table_as(table, kind)
    if kind == "json":
        lines = table_as(table, "jsonl").decode().split("\n")[:-1]  # a caption may hold other line ends
        return ("[" + ",\n ".join(lines) + "]\n").encode()
    return _text(table).encode(errors="replace")


def _text(table: pa.Table, most: int = 200) -> str:
    """Aligned columns, numbers to the right, at most `most` rows."""
    rows = [[_cell(value) for value in row.values()] for row in rows_of(table.slice(0, most))]
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    numeric = [any(of(kind) for of in kinds) for kind in table.schema.types]
    lines = grid(table.schema.names, rows, numeric)
    if table.num_rows > most:
        lines.append(f"... {table.num_rows - most:,} more rows: --format csv, json or parquet gives all")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return text if len(text) <= 60 else text[:59] + "…"
