"""The same rows for machines: parquet, JSONL and CSV with one documented schema, and a data set card beside them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audit.base.storage import Folder

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
_FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]|'*[\t\r\n]")


def plain_text(value: str) -> str:
    """A cell that no spreadsheet takes for a formula: one apostrophe goes before what could start one.

    Undone by taking one apostrophe away from a cell that matches the same rule: `'*\\s*[=+-@]`.
    """
    return "'" + value if _FORMULA.match(value) else value


def table_as(table: pa.Table, kind: str) -> bytes:
    """A table as the bytes of one file.

    Args:
        kind: parquet (descriptions as column metadata), jsonl (one object a row, null for null) or csv (UTF-8,
            RFC 4180, empty for null, `plain_text` cells).
    """
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()
    if kind == "jsonl":
        lines = (json.dumps(row, ensure_ascii=False, default=_json) for row in _rows(table))
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    return _csv(table)


def _rows(table: pa.Table) -> list[dict[str, object]]:
    return [{key: _finite(value) for key, value in row.items()} for row in table.to_pylist()]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and value - value != 0 else value  # JSON has no NaN and no infinity


def _json(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _csv(table: pa.Table) -> bytes:
    import csv

    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow([plain_text(name) for name in table.schema.names])
    for row in _rows(table):
        writer.writerow([_cell(value) for value in row.values()])
    return file.getvalue().encode("utf-8", "replace")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False, default=_json)
    return plain_text(value if isinstance(value, str) else _json(value))


def write_exports(
    folder: Folder, tables: dict[str, pa.Table], formats: Sequence[str], facts: dict[str, Any]
) -> list[str]:
    """Write every table in every format into `exports/`, and a data set card; returns the names written.

    Args:
        folder: of the report. tables: by file name without extension. formats: of EXPORTS. facts: report_facts.
    """
    names = []
    for stem, table in tables.items():
        for kind in formats:
            names.append(f"exports/{stem}.{kind}")
            folder.write(names[-1], table_as(table, kind))
    folder.write("exports/README.md", data_card(tables, formats, facts).encode())
    return [*names, "exports/README.md"]


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
