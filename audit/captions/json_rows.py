"""JSON in its three forms: an object a line, an array of objects, an object of objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import IO, Any

from audit.base.errors import AuditError
from audit.captions.text_lines import LONGEST, TOO_LONG, TextFormat, check_length, lines_of

_PIECE = 1 << 20  # characters of a document decoded at once


def json_rows(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("line 3", "item 3", "record 'id'") and object of every record.

    One object a line; or one array of objects; or one object of objects, whose names become `key` where a record has
    none. The latter two are decoded piece by piece: memory holds one record and a piece.

    Raises:
        AuditError: what is none of these, with its place and the way out.
    """
    lines = lines_of(path, raw, text)
    number, head = 0, ""
    for head in lines:
        number += 1
        if head.strip():
            break
    form = _form(head.strip(), whole=len(head) < LONGEST)
    if form == "one line":  # a document of its own where nothing follows, else the first of many records
        ahead = []
        for line in lines:
            ahead.append(line)
            if line.strip():
                break
        form = "lines" if ahead and ahead[-1].strip() else "records"
        lines = itertools.chain(ahead, lines)
    if form == "lines":
        yield from _json_lines(path, head, number, lines)
    elif form == "array":
        yield from _json_array(path, _Document(path, head, lines))
    else:
        yield from _json_records(path, _Document(path, head, lines))


def _form(head: str, whole: bool) -> str:
    """Which of the three forms, from the first line that is not blank; `whole`: it does not go on."""
    if head.startswith("["):
        return "array"
    if not head.startswith("{"):
        return "lines"  # and its error
    if not whole:
        return "records"
    try:
        first = json.loads(head)
    except RecursionError:
        return "lines"
    except json.JSONDecodeError as error:
        return "records" if error.pos >= len(head) else "lines"  # it goes on in the next line, or is wrong in this one
    except ValueError:
        return "lines"
    return "one line" if first and all(isinstance(value, dict) for value in first.values()) else "lines"


def _json_lines(path: str, head: str, number: int, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    line: str | None = head
    while line is not None:
        check_length(path, number, line)
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
                way_out = "; one object a line is needed" + (
                    ": jq -c '.[]'" if isinstance(record, list) else ": jq -c '{caption: .}'" * isinstance(record, str)
                )
                raise AuditError(f"{path}: line {number} is not a JSON object{way_out}")
            yield f"line {number}", record
        line, number = next(lines, None), number + 1


def _json_array(path: str, document: _Document) -> Iterator[tuple[str, dict[str, Any]]]:
    document.take("[")
    number = 0
    while not document.ends("]", number):
        record, number = document.value(), number + 1
        if not isinstance(record, dict):
            way_out = ": jq -c '.[] | {caption: .}'" if isinstance(record, str) else ""
            raise AuditError(f"{path}: item {number} of the JSON array is {_name(record)}, not an object{way_out}")
        yield f"item {number}", record


def _json_records(path: str, document: _Document) -> Iterator[tuple[str, dict[str, Any]]]:
    document.take("{")
    number = 0
    while not document.ends("}", number):
        key, number = document.value(), number + 1
        document.take(":")
        record = document.value()
        if not isinstance(record, dict):
            one = "; where it is one record: jq -c ." if number == 1 and isinstance(record, str) else ""
            way_out = shape_hint({key: record}) + one
            raise AuditError(
                f"{path}: one JSON object, in which {key!r} is {_name(record)}; records are read one a line, as an "
                f"array, or as an object of records{way_out}"
            )
        yield f"record {key!r}", {"key": key, **record}


def shape_hint(record: dict[str, Any]) -> str:
    """What an object without captions of its own may be, as the jq that takes it apart; "" where there is no guess."""
    for key, value in record.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return f"; its records lie in an array: jq -c '.[{json.dumps(key)}][]', or another of its arrays"
    captions = [value for value in record.values() if isinstance(value, str) or _is_texts(value)]
    if captions and len(captions) == len(record):
        return "; where its names are keys: jq -c 'to_entries[]' and --caption-col value"
    return ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(each is None or isinstance(each, str) for each in value)


def check_caption(place: str, name: str, value: Any, lists: bool) -> None:
    """Raise AuditError for a caption that is no text, nor, where lists are read, a list of texts."""
    if value is None or isinstance(value, str) or (lists and _is_texts(value)):
        return
    if not isinstance(value, list):
        raise AuditError(f"{place}: {name!r} is {type(value).__name__}, not text")
    if _is_texts(value):
        raise AuditError(f"{place}: {name!r} is list, not text: pass --caption-col {name} for a row a caption")
    raise AuditError(f"{place}: {name!r} is a list, and not of texts{shape_hint({name: value})}")


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
                if least > 2 * LONGEST:
                    raise AuditError(f"{self._path}: {TOO_LONG.format('a record')}") from error
                if not self._more(least):
                    what = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise AuditError(f"{self._path}: not JSON, or cut short: {what}") from error
            least *= 2  # so that a long value is decoded few times
