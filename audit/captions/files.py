"""Caption files as they are found: what is in them, which column the captions are, whether they are whole."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from audit.base.errors import AuditError, check_machine
from audit.base.identity import caption_columns
from audit.base.parquet import open_parquet
from audit.captions.csv_rows import header_hint
from audit.captions.find import TEXT_FORMATS, Source
from audit.captions.json_rows import shape_hint
from audit.captions.streams import (
    BATCH_ROWS,
    HUB_NAME,
    first_record,
    has_lists,
    is_json_list,
    load_dataset,
    open_input,
    reading,
    stream,
    text_columns,
)
from audit.captions.text_lines import PLAIN, TextFormat, first_line, packing
from audit.captions.values import is_caption, is_caption_list, is_empty
from audit.captions.values import text as as_text

_OTHERS = {
    b"PK\3\4": "a zip archive or an Excel file: unpack it, or save it as CSV",
    b"\x1f\x8b": "packed with gzip: name it so, with .gz at its end",
    b"BZh": "packed with bzip2: name it so, with .bz2 at its end",
    b"\xfd7zXZ": "packed with xz: name it so, with .xz at its end",
    b"(\xb5/\xfd": "packed with zstd: name it so, with .zst at its end",
    b"PAR1": "a Parquet file: name it so, with .parquet at its end",
    b"ARROW1": "an Arrow file: name it so, with .arrow at its end",
    b"<!DOCTYPE": "a web page: get the file again",
    b"<html": "a web page: get the file again",
}
"""What a text file never begins with."""
_WHOLE = 8 << 20  # files up to this size are hashed whole: the ones people edit by hand


@dataclass(frozen=True)
class CaptionFile:
    """One input of a run, as recorded in its plan.

    Attributes:
        path: absolute path, URL or data set name.
        format: parquet, arrow, jsonl, csv or dataset.
        rows: rows in it; for the formats that are staged, the rows staged (0 where a limit was met before it).
        size: bytes; 0 for a data set of the hub.
        footer_sha256: of the footer of Parquet and Arrow files above 8 MiB, of the whole content of every other
            file, of the data set's fingerprint or the hub's commit.
        caption_col: the column the captions are read from; "" in a part without rows that has none.
        staged: name of the copy in the run folder for inputs without random access, else None.
        lists: the column holds lists of captions, of which each is a row.
        written: flags that say how a text file is written, else "".
    """

    path: str
    format: str
    rows: int
    size: int
    footer_sha256: str
    caption_col: str
    staged: str | None = None
    lists: bool = False
    written: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `lists` and `written` only where they say something."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("lists", "written")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CaptionFile:
        return cls(**fields)


class Described(NamedTuple):
    """A file; its columns (all of them strings for text files); whether it has no random access and must be staged;
    why its caption column was taken."""

    file: CaptionFile
    schema: pa.Schema
    streamed: bool
    why: str


def describe(
    source: Source, caption_col: str | None, flag: str = "--caption-col", text: TextFormat = PLAIN
) -> Described:
    """Look into one source: footers, first lines, columns. Only text files are read whole, to be hashed.

    `flag` is what names the column on the command line, for messages. Rows are -1 where only reading it all would tell.

    Raises:
        AuditError: not there, not what its name says, cut short, without a caption column that is text.
    """
    path = source.path
    streamed, rows, size, written = True, -1, 0, ""
    if source.format == "dataset":
        dataset, size, sha256 = load_dataset(path)
        rows = getattr(dataset, "num_rows", -1)
        features = dataset.features  # a streamed data set of text files knows none before its first row
        if features:
            schema = features.arrow_schema
        else:
            with reading(path):
                schema = next(iter(dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)), pa.table({})).schema
    else:
        with open_input(path) as file, reading(path):
            size = file.seek(0, io.SEEK_END)
            head = _at(file, 0, 512)
            _check_head(path, source.format, head)
            if source.format == "parquet":
                streamed, (rows, schema) = False, _parquet_facts(path, file, size)
            elif source.format == "arrow" and head.startswith(b"ARROW1"):
                streamed, (rows, schema) = False, _arrow_facts(path, file)
            elif source.format == "arrow":
                file.seek(0)
                schema = pa.ipc.open_stream(file).schema
            else:
                written = text.describe()
                names = text_columns(path, file, source.format, text)
                rows = 0 if names is None else -1
                schema = pa.schema([(name, pa.string()) for name in names or ()])
            sha256 = content_digest(file, size, whole=streamed)
    if rows == 0 and not _candidates(schema, caption_col):  # a part that nothing was written into
        return Described(CaptionFile(path, source.format, 0, size, sha256, ""), schema, streamed, "no rows")
    column, lists, why = find_caption_column(source, schema, caption_col, flag, text)
    if lists:
        streamed, rows = True, -1
    found = CaptionFile(path, source.format, rows, size, sha256, column, lists=lists, written=written)
    return Described(found, schema, streamed, why)


def find_caption_column(
    source: Source, schema: pa.Schema, named: str | None, flag: str, text: TextFormat
) -> tuple[str, bool, str]:
    """The caption column, whether it holds lists of captions, and why it was taken.

    The one named; else the first of `caption_columns` that is there, is text, and has text where several are there.

    Raises:
        AuditError: there is none, there are two of the name, or it is not text.
    """
    path = source.path
    has = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")
    names = _candidates(schema, named)
    if not names and named is not None:
        raise AuditError(f"{path}: no column {named!r}; it has {has}: pass another {flag}")
    if not names:
        hint = header_hint(path, schema.names, text) if source.format == "csv" else ""
        hint = shape_hint(first_record(path, text)) if source.format == "jsonl" else hint
        raise AuditError(f"{path}: no caption column; it has {_short(has) or 'none'}: pass {flag} NAME{hint}")
    single = [name for name in names if len(schema.get_all_field_indices(name)) == 1]
    if not single:
        raise AuditError(f"{path}: two columns are called {names[0]!r}: rename one")
    kinds = {name: schema.field(name).type for name in single}
    texts = [name for name in single if is_caption(kinds[name])]
    listed = next((name for name in single if is_caption_list(kinds[name])), None)
    if named is not None:
        if listed:
            return named, True, f"named by {flag}, a row a caption of its lists"
        if texts:
            lists = flag == "--caption-col" and _holds_json_lists(source, named, text)
            return named, lists, f"named by {flag}" + (", a row a caption of its lists" if lists else "")
    blank: list[str] = []
    for name in texts:
        if (len(texts) == 1 and not listed) or _first_texts(source, name, text):
            why = f"{', '.join(blank)} {'has' if len(blank) == 1 else 'have'} no text" if blank else ""
            others = [other for other in texts if other != name and other not in blank]
            return name, False, why or (f"before {', '.join(others)}" if others else "by its name")
        blank.append(name)
    if blank and not listed:
        return blank[0], False, f"none of {', '.join(blank)} has text"
    for name in single if not listed else ():
        if pa.types.is_null(kinds[name]) or (pa.types.is_floating(kinds[name]) and _all_missing(source, name)):
            return name, False, "it has no text"
    if listed:
        empty = f", and {' and '.join(blank)} {'has' if len(blank) == 1 else 'have'} no text" if blank else ""
        raise AuditError(
            f"{path}: column {listed!r} is {kinds[listed]}, several captions a row{empty}; it has {has}: "
            f"pass {flag} {listed} for a row a caption, or {flag} NAME"
        )
    raise AuditError(f"{path}: column {single[0]!r} is {kinds[single[0]]}, not text; it has {has}: pass {flag} NAME")


def _candidates(schema: pa.Schema, named: str | None) -> list[str]:
    """Columns that could hold the captions, the likeliest first."""
    if named is not None:
        return [named] if named in schema.names else []
    return caption_columns(schema.names)


def _short(text: str) -> str:
    return text if len(text) <= 400 else text[:400] + "..."


def _holds_json_lists(source: Source, name: str, text: TextFormat) -> bool:
    """Whether a column of text holds lists of captions: those of JSON, or text that is a list as JSON writes it.

    Of text the column's name must be a plural, and its values lists: a caption may well begin with a bracket.
    """
    if source.format == "jsonl" and has_lists(source.path, name, text, 100):
        return True
    values = _first_texts(source, name, text, 100, lists=True) if name.lower().endswith("s") else []
    return bool(values) and all(map(is_json_list, values))


def _first_texts(source: Source, name: str, text: TextFormat, count: int = 1, lists: bool = False) -> list[str]:
    """The first values of a column that are not blank; [] where all are. Of a hub's data set the first rows count."""
    hub = source.format == "dataset" and HUB_NAME.fullmatch(source.path) is not None
    found: list[str] = []
    for table in stream(source.path, source.format, name, (), text, as_lists=lists):
        values = as_text(table.column(0))
        found += values.filter(pa.array(~is_empty(values))).slice(0, count - len(found)).to_pylist()
        if hub or len(found) == count:
            return found or [""]
    return found


def _all_missing(source: Source, name: str) -> bool:
    """Whether a float column holds nothing but null and NaN, as pandas writes text that is missing throughout."""
    return all(
        np.isnan(table.column(0).cast(pa.float64()).to_numpy()).all()
        for table in stream(source.path, source.format, name, (), PLAIN)
    )


def _check_head(path: str, kind: str, head: bytes) -> None:
    if not head:
        raise AuditError(f"{path}: the file is empty (0 bytes)")
    if head.startswith(b"version https://git-lfs"):
        raise AuditError(f"{path}: a git-LFS pointer, not the file itself: run `git lfs pull`")
    if kind == "arrow" and head.startswith(b"FEA1"):
        raise AuditError(f"{path}: Feather version 1: write it again as version 2, or as Parquet")
    other = next((what for start, what in _OTHERS.items() if head.startswith(start)), None)
    if kind in TEXT_FORMATS and other and not packing(path):
        raise AuditError(f"{path}: no text, but {other}")
    if kind == "parquet" and not head.startswith((b"PAR1", b"PARE")):
        raise AuditError(f"{path}: not a Parquet file: it starts with {head[:16]!r}")


def _parquet_facts(path: str, file: IO[bytes], size: int) -> tuple[int, pa.Schema]:
    parquet = open_parquet(path, file)
    metadata = parquet.metadata
    ends = [0]
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(c) for c in range(metadata.num_columns))
        ends += [
            min((at for at in (c.data_page_offset, c.dictionary_page_offset) if at), default=0)
            + c.total_compressed_size
            for c in columns
        ]
    if max(ends) > size - 8:
        raise AuditError(f"{path}: the Parquet file is damaged: its row groups need {max(ends)} bytes, it has {size}")
    return metadata.num_rows, parquet.schema_arrow


def _arrow_facts(path: str, file: IO[bytes]) -> tuple[int, pa.Schema]:
    try:
        fragment = pyarrow.dataset.IpcFileFormat().make_fragment(pa.PythonFile(file, mode="r"))
        return fragment.count_rows(), fragment.physical_schema
    except (pa.ArrowInvalid, OSError) as error:
        check_machine(path, error)
        raise AuditError(f"{path}: the Arrow file is cut short or damaged: {first_line(error)}") from error


def content_digest(file: IO[bytes], size: int, whole: bool) -> str:
    """What identifies a file's content: see `CaptionFile.footer_sha256`."""
    digest = hashlib.sha256()
    if whole or size <= _WHOLE:
        file.seek(0)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    else:
        # Parquet ends in <length><PAR1>, Arrow in <length><ARROW1>; both lengths are little-endian int32.
        tail = _at(file, size - 10, 10)
        length, extra = (tail[2:6], 8) if tail.endswith(b"PAR1") else (tail[:4], 10)
        footer = int.from_bytes(length, "little") + extra
        digest.update(_at(file, max(size - footer, 0), footer))
    return digest.hexdigest()


def _at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
