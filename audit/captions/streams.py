"""Caption sources without random access (text files, Arrow streams, data sets, lists of captions), front to back."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from lzma import LZMAError
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from audit.base.errors import AuditError, StorageError, check_machine
from audit.base.identity import id_text
from audit.base.parquet import rows_at_once
from audit.base.progress import Progress
from audit.captions.csv_rows import csv_rows
from audit.captions.json_rows import check_caption, json_rows
from audit.captions.remarks import Remarks, has_text
from audit.captions.text_lines import TextFormat, first_line
from audit.captions.values import is_list, one_caption_a_row
from audit.captions.values import text as as_text

BATCH_ROWS = 8192
BATCH_BYTES = 32 << 20  # of captions that are held together, where they are long
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
_PEEK_ROWS = 100_000
_LONG = 256 << 20  # bytes that take a while


def open_input(path: str) -> IO[bytes]:
    """Open a path or URL for reading, seekable. Raises AuditError when it is not there, StorageError when it fails."""
    try:
        fs, name = fsspec.core.url_to_fs(path)
        return fs.open(name, "rb")
    except FileNotFoundError as error:
        raise AuditError(f"{path}: no such file") from error
    except Exception as error:  # every file system driver has its own exceptions
        raise StorageError(f"{path}: cannot be opened: {first_line(error)}") from error


_DAMAGE = (pa.ArrowException, OSError, EOFError, zlib.error, LZMAError, UnicodeDecodeError, ValueError)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a damaged file makes its reader raise into one line that names the file."""
    try:
        yield
    except _DAMAGE as error:
        check_machine(path, error)
        raise AuditError(f"{path}: cannot be read, cut short or damaged: {first_line(error)}") from error


def stream(
    path: str,
    kind: str,
    caption_col: str,
    columns: Sequence[str],
    text: TextFormat,
    lists: bool = False,
    as_lists: bool = False,
    most: int | None = None,
    remarks: Remarks | None = None,
) -> Iterator[pa.Table]:
    """The rows of a source, front to back: the caption column as `caption`, then `columns`, which it has.

    Columns of text files are text: strings as they are, other JSON values as JSON.

    Args:
        path, kind: of the file. caption_col, columns: what is read of it. text: how text files are written.
        lists: the caption column holds lists of captions: a row each, one without a caption for an empty list.
        as_lists: lists may be there, and stay as they are (JSON in text files).
        most: rows of a text file to read; None for all. remarks: where what is odd in them is counted.

    Raises:
        AuditError: a malformed line (with its number), a file cut short, a hub that cannot be reached.
    """
    names = list(dict.fromkeys([caption_col, *columns]))
    if kind == "dataset":
        dataset = load_dataset(path)[0]
        with reading(path):
            for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=BATCH_ROWS):
                yield _named(table, caption_col, columns, lists)
        return
    with open_input(path) as raw, reading(path), _progress(path, raw) as bar:
        for table in _blocks(path, kind, raw, names, text, lists or as_lists, most, remarks):
            yield _named(table, caption_col, columns, lists)
            if bar:
                bar.add((raw.tell() >> 20) - bar.done)


def _progress(path: str, raw: IO[bytes]) -> Progress | nullcontext[None]:
    """A bar in MiB for what takes longer than a few seconds to read."""
    size = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    return Progress(size >> 20, "MiB", f"reading {path.rsplit('/', 1)[-1]}") if size > _LONG else nullcontext()


def _blocks(
    path: str,
    kind: str,
    raw: IO[bytes],
    names: list[str],
    text: TextFormat,
    lists: bool,
    most: int | None,
    remarks: Remarks | None,
) -> Iterator[pa.Table]:
    if kind == "parquet":
        yield from (pa.Table.from_batches([batch]) for batch in _parquet_batches(raw, names))
    elif kind == "arrow":
        yield from (pa.Table.from_batches([batch]) for batch in _arrow_batches(raw))
    else:
        values: Iterator[list[Any]] = (
            _json_values(path, raw, names, text, lists, remarks)
            if kind == "jsonl"
            else _csv_values(path, raw, names, text, remarks)
        )
        rows = itertools.islice(values, most)
        while block := _block(rows):
            yield pa.table([pa.array(values, pa.string()) for values in zip(*block, strict=True)], names=names)


def _block(rows: Iterator[list[Any]]) -> list[list[Any]]:
    """The next rows to hold together: many, or few long ones."""
    block, held = [], 0
    for row in rows:
        block.append(row)
        held += sum(len(value) for value in row if value is not None)
        if len(block) == BATCH_ROWS or held > BATCH_BYTES:
            break
    return block


def _parquet_batches(raw: IO[bytes], names: list[str]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
    most = rows_at_once(file.metadata, names, BATCH_ROWS, BATCH_BYTES)
    groups, captions = list(range(file.num_row_groups)), file.schema_arrow.field(names[0]).type
    # lists of categories: pyarrow reads no batch of them that lies in two row groups
    alone = is_list(captions) and pa.types.is_dictionary(captions.value_type)
    for together in [[group] for group in groups] if alone else [groups]:
        yield from file.iter_batches(most, row_groups=together, columns=names, use_threads=False)


def _arrow_batches(raw: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """Record batches of an Arrow file or stream."""
    raw.seek(0)
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(raw)
        return
    file = pa.ipc.open_file(raw)
    yield from (file.get_batch(at) for at in range(file.num_record_batches))


def text_columns(path: str, file: IO[bytes], kind: str, text: TextFormat) -> list[str] | None:
    """Columns of a CSV header, or of the first records of JSON; None where there is neither."""
    if kind == "csv":
        header = next(csv_rows(path, file, text), None)
        return header[1] if header else None
    names: dict[str, None] | None = None
    for _, record in itertools.islice(json_rows(path, file, text), _PEEK_ROWS):
        names = {} if names is None else names
        names.update(dict.fromkeys(record))
    return None if names is None else list(names)


def first_record(path: str, text: TextFormat) -> dict[str, Any]:
    """The first record of a JSON file that has one."""
    with open_input(path) as raw, reading(path):
        return next(json_rows(path, raw, text))[1]


def has_lists(path: str, name: str, text: TextFormat, count: int) -> bool:
    """Whether one of the first `count` values of a JSON file that are there is a list."""
    with open_input(path) as raw, reading(path):
        values = (record[name] for _, record in json_rows(path, raw, text) if record.get(name) is not None)
        return any(isinstance(value, list) for value in itertools.islice(values, count))


def _named(table: pa.Table, caption_col: str, columns: Sequence[str], lists: bool) -> pa.Table:
    arrays = [table[name] for name in (caption_col, *columns)]
    if lists:
        arrays = _one_caption_a_row(arrays)
    return pa.table(arrays, names=["caption", *columns])


def _one_caption_a_row(arrays: list[pa.ChunkedArray]) -> list[pa.Array]:
    """The first column's lists as a row a caption, the others repeated."""
    lists, *others = arrays
    if not is_list(lists.type):
        lists = pa.array([_json_list(value) for value in as_text(lists).to_pylist()], pa.list_(pa.string()))
    captions, rows = one_caption_a_row(lists)
    return [captions, *(column.take(rows) for column in others)]


def _json_list(value: str | None) -> list[str | None]:
    """The captions in one cell that holds them as JSON; a cell that does not is one caption itself."""
    if value is not None and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        if isinstance(found, list) and all(text is None or isinstance(text, str) for text in found):
            return [text if text is None else text.encode(errors="replace").decode() for text in found]
    return [value]


def is_json_list(value: str | None) -> bool:
    """Whether a cell holds a list of captions as JSON."""
    return value is not None and value.lstrip().startswith("[") and _json_list(value) != [value]


def _json_values(
    path: str, raw: IO[bytes], names: list[str], text: TextFormat, lists: bool, remarks: Remarks | None
) -> Iterator[list[str | None]]:
    """The named values of each record, the first of which is the caption."""
    for place, record in json_rows(path, raw, text):
        caption = record.get(names[0])
        if isinstance(caption, float) and math.isnan(caption):
            caption = record[names[0]] = None  # as pandas writes what is missing
        check_caption(f"{path}: {place}", names[0], caption, lists)
        if remarks and not has_text(caption):
            remarks.no_caption(f"{path}, {place}", record)
        yield [_json_text(record.get(name)) for name in names]


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, float):
        return id_text(value)
    # Lone surrogates are legal in JSON and in no UTF-8 text.
    return value.encode(errors="replace").decode() if isinstance(value, str) else json.dumps(value)


def _csv_values(
    path: str, raw: IO[bytes], names: list[str], text: TextFormat, remarks: Remarks | None
) -> Iterator[list[str]]:
    rows = csv_rows(path, raw, text)
    before, header = next(rows)
    places = [header.index(name) for name in names]
    for number, row in rows:
        if len(row) != len(header):
            what = "header" if text.header else "first line"
            quotes = any("\n" in field for field in row) and text.quoting is None
            way_out = "; a quoted field goes over lines: pass --quoting none where quotes are letters" if quotes else ""
            raise AuditError(f"{path}: line {number} has {len(row)} fields, the {what} {len(header)}{way_out}")
        if remarks and number > before + 1 and text.quoting is None:  # or there are blank lines
            remarks.over_lines(path, number, row)
        if remarks and not has_text(row[places[0]]):
            remarks.no_caption(f"{path}, line {number}", dict(zip(header, row, strict=True)))
        before = number
        yield [row[place] for place in places]


def load_dataset(path: str) -> tuple[Any, int, str]:
    """A saved data set or one of the hub (streamed at a pinned commit): it, its bytes, its fingerprint."""
    import datasets

    fs, root = fsspec.core.url_to_fs(path)
    folder, split = (root, None) if fs.isdir(root) else root.rpartition(":")[::2]
    if folder and fs.isdir(folder):
        url = folder if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(folder)
        with reading(path):
            loaded = _one_split(path, datasets.load_from_disk(url), split)
        return loaded, sum(fs.size(name) for name in fs.find(folder)), str(loaded._fingerprint)
    import huggingface_hub

    match = HUB_NAME.fullmatch(path)
    if match is None:
        raise AuditError(f"{path}: no such folder")
    try:
        info = huggingface_hub.HfApi().dataset_info(match["name"], revision=match["revision"], timeout=30)
        loaded = datasets.load_dataset(match["name"], revision=info.sha, split=match["split"], streaming=True)
    except Exception as error:  # the hub, its transport and dataset scripts raise too many kinds to list
        what = "no such file or folder, and no data set of that name could be opened on the Hugging Face hub"
        raise AuditError(f"{path}: {what}: {first_line(error)}") from error
    return _one_split(path, loaded, None), 0, str(info.sha)


def _one_split(path: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        name = path.removesuffix(f":{split}")
        raise AuditError(f"{path}: it has the splits {', '.join(loaded)}: pass one, as {name}:{next(iter(loaded))}")
    return loaded[split]
