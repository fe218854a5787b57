"""Text files of captions, decoded and unpacked: CSV and TSV with their dialect, JSON in its three forms."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from audit.base.errors import AuditError

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Extensions of compressed text files."""
csv.field_size_limit(1 << 30)  # its default of 128 kB is for a caption column, not for what lies beside
_PIECE = 1 << 20  # characters of a JSON document decoded at once
_WEB = re.compile(r"(https?|s3|gs|ftp)://\S+")
_ENCODING_FLAG = "pass --encoding NAME (latin-1, cp1252, utf-16, ...)"


@dataclass(frozen=True)
class TextFormat:
    """How text files are written, where the user says so.

    Attributes:
        delimiter: of CSV; None takes a tab for .tsv, else a comma.
        header: whether the first row of CSV names the columns; without, see `column_names`.
        encoding: of CSV and JSON; None is UTF-8, or UTF-16 where a byte order mark says so.
    """

    delimiter: str | None = None
    header: bool = True
    encoding: str | None = None

    @classmethod
    def of(cls, delimiter: str | None, no_header: bool, encoding: str | None) -> TextFormat:
        """From the flags --delimiter, --no-header and --encoding. Raises AuditError naming the flag."""
        names = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
        delimiter = names.get(delimiter, delimiter) if delimiter else delimiter
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"'):
            raise AuditError(f"--delimiter {delimiter!r}: give one character, or tab, semicolon, pipe")
        if encoding is not None:
            try:
                if not codecs.lookup(encoding)._is_text_encoding:
                    raise LookupError
            except LookupError as error:
                raise AuditError(f"--encoding {encoding}: no such encoding; for example latin-1, utf-16") from error
        return cls(delimiter, not no_header, encoding)

    def describe(self) -> str:
        """The flags that say so, "" where nothing is said."""
        return " ".join(
            flag
            for flag, given in (
                (f"--delimiter {self.delimiter!r}", self.delimiter is not None),
                ("--no-header", not self.header),
                (f"--encoding {self.encoding}", self.encoding is not None),
            )
            if given
        )


PLAIN = TextFormat()


def first_line(error: BaseException) -> str:
    """An error's message cut to one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


def packing(path: str) -> str:
    """The extension that says a file is compressed; "" where none does."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    return next((extension for extension in PACKED if name.endswith(extension)), "")


def unpacked_name(path: str) -> str:
    """A name in lower case, without a URL's query and without what says that it is compressed."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    return name.removesuffix(packing(path))


# --- CSV --------------------------------------------------------------------------------------------------------


def csv_rows(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line and fields of every row that is not blank, the names of the columns first.

    Tab-separated files without a header are dumps that know no quotes (CC3M, CC12M); all others are quoted as CSV.

    Raises:
        AuditError: a line that is not CSV, or not of the encoding.
    """
    delimiter = text.delimiter or ("\t" if unpacked_name(path).endswith(".tsv") else ",")
    width = 0
    lines = _lines(path, raw, text)
    if delimiter == "\t" and not text.header:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            dump = "; a dump that knows no quotes and no header: pass --no-header" if delimiter == "\t" else ""
            raise AuditError(f"{path}: line {reader.line_num}: not CSV: {error}{dump}") from error
        if width == 1 and not row:
            row = [""]  # in a file of one column, a blank line is a caption that is not there
        if row:
            if not width and not text.header:
                yield 0, column_names(row)
            width = width or len(row)
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
    hints = []
    if len(names) == 1 and not text.delimiter:
        other = next((sign for sign in "\t;|," if sign in names[0]), None)
        if other is not None:
            hints.append(f"--delimiter {'tab' if other == chr(9) else repr(other)}")
    if any(_WEB.search(name) or len(name) > 60 or len(name.split()) > 4 for name in names):
        hints.append("--no-header")
    return f"; its first line reads like a row: pass {' '.join(hints)}" if hints else ""


# --- JSON -------------------------------------------------------------------------------------------------------


def json_rows(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("line 3", "item 3", "record 'id'") and object of every record.

    One object a line; or one array of objects; or one object of objects, whose names become `key` where a record has
    none. The latter two are decoded piece by piece: memory holds one record and a piece.

    Raises:
        AuditError: what is none of these, with its place and the way out.
    """
    lines = _lines(path, raw, text)
    number, head = 0, ""
    for head in lines:
        number += 1
        if head.strip():
            break
    form = _form(head.strip())
    if form == "lines":
        yield from _json_lines(path, head, number, lines)
    elif form == "array":
        yield from _json_array(path, _Document(path, head, lines))
    else:
        yield from _json_records(path, _Document(path, head, lines))


def _form(head: str) -> str:
    """Which of the three forms, from the first line that is not blank."""
    if head.startswith("["):
        return "array"
    if not head.startswith("{"):
        return "lines"  # and its error
    try:
        first = json.loads(head)
    except RecursionError:
        return "lines"
    except json.JSONDecodeError as error:
        return "records" if error.pos >= len(head) else "lines"  # it goes on in the next line, or is wrong in this one
    except ValueError:
        return "lines"
    return "records" if first and all(isinstance(value, dict) for value in first.values()) else "lines"


def _json_lines(path: str, head: str, number: int, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    line: str | None = head
    while line is not None:
        stripped = line.strip()
        if stripped:
            try:
                record = json.loads(stripped)
            except RecursionError as error:
                raise AuditError(f"{path}: line {number}: nested too deep") from error
            except ValueError as error:
                what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise AuditError(f"{path}: line {number} is not JSON: {what}") from error
            if not isinstance(record, dict):
                way_out = ": one object a line is needed: jq -c '.[]'" if isinstance(record, list) else ""
                raise AuditError(f"{path}: line {number} is not a JSON object{way_out}")
            yield f"line {number}", record
        line, number = next(lines, None), number + 1


def _json_array(path: str, document: _Document) -> Iterator[tuple[str, dict[str, Any]]]:
    document.take("[")
    number = 0
    while not document.ends("]", number):
        record, number = document.value(), number + 1
        if not isinstance(record, dict):
            raise AuditError(f"{path}: item {number} of the JSON array is {_name(record)}, not an object")
        yield f"item {number}", record


def _json_records(path: str, document: _Document) -> Iterator[tuple[str, dict[str, Any]]]:
    document.take("{")
    number = 0
    while not document.ends("}", number):
        key, number = document.value(), number + 1
        document.take(":")
        record = document.value()
        if not isinstance(record, dict):
            way_out = f": jq -c '.[{json.dumps(key)}][]'" if isinstance(record, list) else ": jq -c ."
            raise AuditError(
                f"{path}: one JSON object, in which {key!r} is {_name(record)}; records are read one a line, as an "
                f"array, or as an object of records{way_out}"
            )
        yield f"record {key!r}", {"key": key, **record}


def _name(value: Any) -> str:
    return "an array" if isinstance(value, list) else "null" if value is None else type(value).__name__


class _Document:
    """A JSON document read value by value; holds the value in hand and a piece of what follows."""

    def __init__(self, path: str, head: str, lines: Iterator[str]) -> None:
        self._path, self._lines, self._text, self._at = path, lines, head, 0
        self._decoder = json.JSONDecoder()

    def _more(self, least: int) -> bool:
        """Read on until at least so many characters lie ahead; False at the end of the file."""
        parts, length = [self._text[self._at :]], len(self._text) - self._at
        before = length
        while length < least and (line := next(self._lines, None)) is not None:
            parts.append(line)
            length += len(line)
        self._text, self._at = "".join(parts), 0
        return length > before

    def _next(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more(_PIECE):
                return ""

    def take(self, sign: str) -> None:
        """Go past one sign. Raises AuditError where something else stands."""
        found = self._next()
        if found != sign:
            raise AuditError(
                f"{self._path}: not JSON: {sign!r} is missing, there is {found or 'the end of the file'!r}"
            )
        self._at += 1

    def ends(self, sign: str, number: int) -> bool:
        """Whether the document ends here, with `sign`; else go past the comma that follows `number` values."""
        if self._next() == sign:
            self._at += 1
            if rest := self._next():
                raise AuditError(f"{self._path}: not JSON: {rest!r} after its end")
            return True
        if number:
            self.take(",")
        return False

    def value(self) -> Any:
        """The next value, whole."""
        self._next()
        least = _PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more(least):  # a number may go on
                    self._at = end
                    return value
            except RecursionError as error:
                raise AuditError(f"{self._path}: nested too deep") from error
            except ValueError as error:
                if not self._more(least):
                    what = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise AuditError(f"{self._path}: not JSON, or cut short: {what}") from error
            least *= 2  # so that a long value is decoded few times


# --- lines ------------------------------------------------------------------------------------------------------


def _lines(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[str]:
    """The lines of a text file, unpacked and decoded, with their ends. Raises AuditError: not of the encoding."""
    plain = _unpacked(path, raw)
    encoding = text.encoding
    if encoding is None:
        head = plain.peek(4)[:4]
        encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        for number, line in enumerate(plain, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise AuditError(f"{path}: line {number}: not UTF-8: {error.reason}: {_ENCODING_FLAG}") from error
        return
    number = 1
    try:
        for number, decoded in enumerate(io.TextIOWrapper(plain, encoding, newline="\n"), 1):
            yield decoded.removeprefix("\ufeff") if number == 1 else decoded
    except UnicodeError as error:
        raise AuditError(f"{path}: after line {number}: not {encoding}: {error}: pass another --encoding") from error


def _unpacked(path: str, raw: IO[bytes]) -> io.BufferedReader:
    """The bytes of a text file, unpacked where its name says so; closing it leaves `raw` open."""
    raw.seek(0)
    kind, borrowed = packing(path), _Borrowed(raw)
    if kind == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if kind == ".bz2":
        return io.BufferedReader(bz2.BZ2File(raw))
    if kind == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw))
    if kind == ".zst":
        return io.BufferedReader(_Borrowed(pa.CompressedInputStream(pa.PythonFile(borrowed, mode="r"), "zstd")))
    return io.BufferedReader(borrowed, 1 << 20)


class _Borrowed(io.RawIOBase):
    """A reader that does not close the file it reads from, as TextIOWrapper would."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
