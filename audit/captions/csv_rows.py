"""CSV and TSV with their dialect: delimiter, header, quotes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import IO

from audit.base.errors import AuditError
from audit.captions.text_lines import LONGEST, TextFormat, unpacked_name, whole_lines

csv.field_size_limit(LONGEST)  # its default of 128 kB is for a caption column, not for what lies beside
_WEB = re.compile(r"(https?|s3|gs|ftp)://\S+")


def csv_rows(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line and fields of every row that is not blank, the names of the columns first.

    Raises:
        AuditError: a line that is not CSV, or not of the encoding; a quoted field of a tab-separated file that holds
            a line that is a row itself: the quote was a letter, and rows would be lost.
    """
    delimiter = text.delimiter or ("\t" if unpacked_name(path).endswith(".tsv") else ",")
    quoting = text.quoting or ("none" if delimiter == "\t" and not text.header else "csv")
    lines = whole_lines(path, raw, text)
    rows = _split(lines, delimiter) if quoting == "none" else _quoted(path, lines, delimiter, text)
    width, number = 0, 0
    for last, row in rows:
        first, number = number + 1, last
        if number > first and delimiter == "\t" and text.quoting is None and any("\t" in field for field in row):
            raise AuditError(
                f"{path}: lines {first} to {number}: a quoted field that holds whole rows: pass --quoting none where "
                "quotes are letters, --quoting csv where it is one field"
            )
        if width == 1 and not row:
            row = [""]  # in a file of one column, a blank line is a caption that is not there
        if row:
            if not width and not text.header:
                yield 0, column_names(row)
            width = width or len(row)
            yield number, row


def _split(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a file that knows no quotes: a carriage return inside a line is a letter too."""
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, line.split(delimiter) if line else []


def _quoted(path: str, lines: Iterator[str], delimiter: str, text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            dump = ", of a dump without a header pass --no-header" if delimiter == "\t" and text.header else ""
            what, when = str(error), "quotes are letters"
            if what.startswith("new-line character"):
                what = "a carriage return outside quotes: where it ends lines, tr '\\r' '\\n' mends it"
                when = "it is part of a caption"
            raise AuditError(
                f"{path}: line {reader.line_num}: not CSV: {what}; where {when}, pass --quoting none{dump}"
            ) from error
        yield reader.line_num, row


def column_names(row: list[str]) -> list[str]:
    """Names for the columns of a file without a header, from its first row.

    A field that is a URL is `url`; where one field is left it is `caption`, else they are `column_1`, `column_2`, ...
    """
    urls = [at for at, value in enumerate(row) if _WEB.fullmatch(value.strip())]
    names = [f"column_{at + 1}" for at in range(len(row))]
    if len(urls) == 1:
        names[urls[0]] = "url"
    if len(row) - len(urls) == 1:
        names[next(at for at in range(len(row)) if at not in urls)] = "caption"
    return names


def header_hint(path: str, names: list[str], text: TextFormat) -> str:
    """What a header that names no captions may mean, as the flag to pass; "" where it says nothing."""
    if not text.header:
        return ""
    if len(names) == 1 and not text.delimiter:
        other = next((sign for sign in "\t;|," if sign in names[0]), None)
        delimiter = f"--delimiter {'tab' if other == chr(9) else repr(other)}" if other else ""
    else:
        delimiter = ""
    row = any(_WEB.search(name) or len(name) > 60 or len(name.split()) > 4 for name in names)
    flags = " ".join(flag for flag in (delimiter, "--no-header" if row else "") if flag)
    return (
        f"; its first line reads like a row: pass {flags}" if flags else "; where its first line is a row: --no-header"
    )
