"""The same rows for machines: parquet, JSONL and CSV with one documented schema, and a data set card beside them."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audit.base.text import plain_text

EXPORTS = ("parquet", "jsonl", "csv")
TABLES = {
    "flagged": "Captions that confirm looked at, and the best-scored beyond them. Reproduced ones first (`global`, "
    "then `local`), the surest (lowest `q_value`) first, then the others, the highest `score` first, then the lowest "
    "`row_id`. "
    "Every caption once.",
    "denylist": "What to drop from a training set: every row, repeats included, whose caption reproduces a training "
    "picture (`source` is caption), and every training picture that was reproduced (`source` is picture). Where "
    "confirm has not run it holds the flagged captions, with a null `verdict`.",
    "candidates": "Every URL that came with a flagged caption, once each, as img2dataset takes it (docs/url-lists.md); "
    "parquet only, and only where the run kept URLs.",
}
READING = (
    "A verdict `global` means that a generated image is a copy of a training picture (SSCD > 0.5), `local` that a "
    "region of it is, `none` that no copy was found among the pictures it was compared with: not that there is none. "
    "A score alone is a suspicion. Captions and URLs are as they came with the data: treat them as untrusted text.\n\n"
    "Parquet and JSONL hold the text unchanged. In CSV a cell that a spreadsheet could take for a formula (after any "
    "apostrophes and blanks it begins with = + - @ or their wide forms, or it begins with a tab or line break) has an "
    "apostrophe before it; programs should read parquet or JSONL."
)
_NOT_HELD = (ArithmeticError, ValueError, LookupError)  # what to_pylist raises: too far, broken, of an unknown zone


def table_as(table: pa.Table, kind: str) -> bytes:
    """A table as the bytes of one file.

    Args:
        kind: parquet (descriptions as column metadata, text for what it cannot hold), jsonl (one object a row, null
            for null) or csv (UTF-8, RFC 4180, empty for null, `plain_text` cells).
    """
    if kind == "parquet":
        try:
            return _parquet(table)
        except pa.ArrowException:
            return _parquet(_storable(table))
    if kind == "jsonl":
        lines = (_json(row) for row in rows_of(table))
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    return _csv(table)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _storable(table: pa.Table) -> pa.Table:
    """A table whose columns that parquet cannot hold (intervals, unions, seconds that are too many) are text."""
    for at, field in enumerate(table.schema):
        try:
            _parquet(table.select([at]))
        except pa.ArrowException:
            texts = [None if value is None else _as_text(value) for value in _values(table.column(at))]
            table = table.set_column(at, field.with_type(pa.string()), pa.array(texts, pa.string()))
    return table


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """A table's rows as `to_pylist` gives them, but dates and times that Python cannot hold, nested ones too, as text.

    Such are years beyond 9999, which a caption file or DuckDB (`'infinity'::DATE`) may hold.
    """
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except _NOT_HELD:
        return [_value(each) for each in column]


def _value(scalar: pa.Scalar) -> Any:
    """What a scalar holds, as Python has it or, of the smallest part that it has not, as text."""
    try:
        return scalar.as_py()
    except _NOT_HELD:
        kind = scalar.type
    if pa.types.is_struct(kind):
        return {field.name: _value(scalar[at]) for at, field in enumerate(kind)}
    if pa.types.is_map(kind):
        return [(_value(pair[0]), _value(pair[1])) for pair in scalar.values]
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):  # a list of any kind
        return [_value(each) for each in scalar.values]
    if not pa.types.is_temporal(kind):
        inner = getattr(scalar, "value", None)  # of a dictionary, a union or an extension
        return (
            _value(inner) if isinstance(inner, pa.Scalar) else scalar.as_buffer().to_pybytes().decode(errors="replace")
        )
    if pa.types.is_duration(kind):
        return str(np.timedelta64(scalar.value, kind.unit))
    unit: Any = kind.unit if pa.types.is_timestamp(kind) else "ms" if pa.types.is_date64(kind) else "D"
    text = str(np.datetime64(scalar.value, unit)).replace("T", " ")
    return f"{text}+00:00" if getattr(kind, "tz", None) else text


def _json(value: object) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, default=_text)


def _plain(value: object) -> object:
    """A value with what JSON can say in place of what it cannot, at any depth: it has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _as_text(value: object) -> str:
    """One value of any type as text."""
    return _json(value) if isinstance(value, (list, dict)) else _text(value)


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _csv(table: pa.Table) -> bytes:
    import csv

    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow([plain_text(name) for name in table.schema.names])
    for row in rows_of(table):
        writer.writerow([_cell(value) for value in row.values()])
    return file.getvalue().encode("utf-8", "replace")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, (int, float)):
        return _plain(value)
    if isinstance(value, Decimal):
        return format(value, "f")  # a number, its minus no formula
    return plain_text(_as_text(value))


def make_exports(tables: dict[str, pa.Table], formats: Sequence[str], facts: dict[str, Any]) -> dict[str, bytes]:
    """Every table in every format and a data set card, as bytes by name below the report; all in `exports/`.

    Args:
        tables: by file name without extension. formats: of EXPORTS. facts: report_facts.
    """
    made = {f"exports/{stem}.{kind}": table_as(table, kind) for stem, table in tables.items() for kind in formats}
    return {**made, "exports/README.md": data_card(tables, formats, facts).encode()}


def data_card(tables: dict[str, pa.Table], formats: Sequence[str], facts: dict[str, Any]) -> str:
    """README.md of the exports: a data set card whose head lets `datasets.load_dataset(FOLDER)` open them."""
    kind = formats[0]
    head = ["---", "configs:"]
    for stem in tables:
        head += [f"- config_name: {stem}", f"  data_files: {stem}.{kind}"]
    confirmed = facts["confirm"]
    lines = [
        *head,
        "---",
        "# Captions a text-to-image model may reproduce training images for",
        "",
        f"Made by `be-audit report` on {facts['made'][:10]} from a run of {facts['created'][:10]}, "
        f"fingerprint `{facts['digest'][:16]}`.",
        "",
        f"- Model: `{_cell_text(str(facts['model']['name']))}`, weights sha256 `{facts['model']['sha256']}`",
        f"- Scored: {facts['scanned']['distinct']:,} different captions in {facts['scanned']['rows']:,} rows",
        f"- Ranked by: `{facts['score']}`"
        + (f", above {facts['threshold']:g}" if facts["threshold"] is not None else ""),
        "- Verdicts: "
        + (", ".join(f"{count:,} {name}" for name, count in facts["verdicts"].items()) if confirmed else "none yet"),
    ]
    lines += [f"- Not finished: {_cell_text(line)}" for line in facts["unfinished"]]
    for stem, table in tables.items():
        lines += ["", f"## {stem}: {table.num_rows:,} rows", "", TABLES[stem], "", *dictionary_lines(table.schema)]
    lines += ["", "## Reading it", "", READING]
    return "\n".join(lines) + "\n"


def dictionary_lines(table: pa.Schema) -> list[str]:
    """A Markdown table of a schema's columns, types and descriptions."""
    lines = ["| column | type | what it is |", "|---|---|---|"]
    for field in table:
        text = (field.metadata or {}).get(b"description", b"").decode()
        lines.append(f"| `{_cell_text(field.name)}` | {_cell_text(str(field.type))} | {_cell_text(text)} |")
    return lines


def _cell_text(text: str) -> str:
    """Text in one cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'")
