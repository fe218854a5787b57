"""Caption sources without random access (JSONL, CSV, Arrow streams, data sets), read once from front to back."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import IO, Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from audit.base.errors import AuditError, StorageError
from audit.base.progress import Progress

BATCH_ROWS = 8192
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
_PEEK_LINES = 100_000
csv.field_size_limit(1 << 30)  # its default of 128 kB is for a caption column, not for what lies beside
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


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a damaged file makes its reader raise into one line that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError) as error:
        raise AuditError(f"{path}: cannot be read, cut short or damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's message cut to one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


def stream(path: str, kind: str, caption_col: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a source without random access: the caption column as `caption`, then `columns`, which it has.

    Columns of JSONL and CSV are text: strings as they are, other JSON values as JSON.

    Raises:
        AuditError: a malformed line (with its number), a gzip cut short, a hub that cannot be reached.
    """
    names = list(dict.fromkeys([caption_col, *columns]))
    if kind == "dataset":
        dataset = load_dataset(path)[0]
        with reading(path):
            for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=BATCH_ROWS):
                yield _named(table, caption_col, columns)
        return
    with open_input(path) as raw, reading(path), _progress(path, raw) as bar:
        for table in _blocks(path, kind, raw, names):
            yield _named(table, caption_col, columns)
            if bar:
                bar.add((raw.tell() >> 20) - bar.done)


def _progress(path: str, raw: IO[bytes]) -> Progress | nullcontext[None]:
    """A bar in MiB for what takes longer than a few seconds to read."""
    size = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    return Progress(size >> 20, "MiB", f"reading {path.rsplit('/', 1)[-1]}") if size > _LONG else nullcontext()


def _blocks(path: str, kind: str, raw: IO[bytes], names: list[str]) -> Iterator[pa.Table]:
    if kind == "arrow":
        yield from (pa.Table.from_batches([batch]) for batch in pa.ipc.open_stream(raw))
        return
    rows = _json_values(path, raw, names) if kind == "jsonl" else _csv_values(path, raw, names)
    while block := list(itertools.islice(rows, BATCH_ROWS)):
        yield pa.table([pa.array(values, pa.string()) for values in zip(*block, strict=True)], names=names)


def text_columns(path: str, file: IO[bytes], kind: str) -> list[str]:
    """Columns of a CSV header, or of the first lines of JSONL."""
    if kind == "csv":
        header = next(_csv_rows(path, file), None)
        return header[1] if header else []
    names: dict[str, None] = {}
    for number, (_, record) in enumerate(_json_rows(path, file)):
        names.update(dict.fromkeys(record))
        if number == _PEEK_LINES:
            break
    return list(names)


def _named(table: pa.Table, caption_col: str, columns: Sequence[str]) -> pa.Table:
    return pa.table([table[name] for name in (caption_col, *columns)], names=["caption", *columns])


def _json_values(path: str, raw: IO[bytes], names: list[str]) -> Iterator[list[str | None]]:
    """The named values of each line, the first of which is the caption."""
    for number, record in _json_rows(path, raw):
        caption = record.get(names[0])
        if caption is not None and not isinstance(caption, str):
            raise AuditError(f"{path}: line {number}: {names[0]!r} is {type(caption).__name__}, not text")
        yield [_json_text(record.get(name)) for name in names]


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    # Lone surrogates are legal in JSON and in no UTF-8 text.
    return value.encode(errors="replace").decode() if isinstance(value, str) else json.dumps(value)


def _json_rows(path: str, raw: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number from 1 and object of every line that is not blank."""
    for number, line in enumerate(_plain(path, raw), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.strip()
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == 1 and line.startswith(b"["):
                raise AuditError(f"{path}: a JSON array; one object a line is needed: jq -c '.[]'") from error
            what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise AuditError(f"{path}: line {number} is not JSON: {what}") from error
        if not isinstance(record, dict):
            way_out = ": one object a line is needed: jq -c '.[]'" if isinstance(record, list) else ""
            raise AuditError(f"{path}: line {number} is not a JSON object{way_out}")
        yield number, record


def _csv_values(path: str, raw: IO[bytes], names: list[str]) -> Iterator[list[str]]:
    rows = _csv_rows(path, raw)
    _, header = next(rows)
    places = [header.index(name) for name in names]
    for number, row in rows:
        if len(row) != len(header):
            raise AuditError(f"{path}: line {number} has {len(row)} fields, the header {len(header)}")
        yield [row[place] for place in places]


def _csv_rows(path: str, raw: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line and fields of every row that is not blank, the header first."""
    width = 0
    lines = enumerate(_plain(path, raw))
    reader = csv.reader((line.decode("utf-8-sig" if at == 0 else "utf-8") for at, line in lines), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise AuditError(f"{path}: line {reader.line_num}: not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise AuditError(f"{path}: line {reader.line_num + 1}: not UTF-8: {error}") from error
        if width == 1 and not row:
            row = [""]  # in a file of one column, a blank line is a caption that is not there
        if row:
            width = width or len(row)
            yield reader.line_num, row


def _plain(path: str, raw: IO[bytes]) -> Any:
    """The bytes of a text file, unpacked where its name says gzip; closing it leaves `raw` open."""
    raw.seek(0)
    if path.lower().split("?")[0].endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    return io.BufferedReader(_Borrowed(raw), 1 << 20)


class _Borrowed(io.RawIOBase):
    """A reader that does not close the file it reads from, as TextIOWrapper would."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


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
