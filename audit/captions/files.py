"""Caption files as they are found: which there are, what is in them and whether they are whole."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from audit.base.errors import AuditError
from audit.base.storage import check_name, list_tree
from audit.captions.streams import BATCH_ROWS, HUB_NAME, first_line, load_dataset, open_input, reading, text_columns

CAPTION_COLUMNS = ("TEXT", "caption", "text", "prompt", "captions")
"""Where a caption is looked for when no column is named: exactly so and in this order, then in any case."""

FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json": "jsonl",
    ".json.gz": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
}
_JSON = (".json", ".json.gz")
# In the folder of a run, of one that is being planned, of an index, of one that is being built, of a report.
_OURS = ("plan.arrow", "_claims/1.json", "index_info.json", "_commits/embed/00000.json", "report.json")
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
        caption_col: the column the captions are read from.
        staged: name of the copy in the run folder for inputs without random access, else None.
    """

    path: str
    format: str
    rows: int
    size: int
    footer_sha256: str
    caption_col: str
    staged: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CaptionFile:
        return cls(**fields)


@dataclass(frozen=True)
class Source:
    """A path, URL or data set name and its format, before anything of it is read."""

    path: str
    format: str


# --- finding ----------------------------------------------------------------------------------------------------


def find_captions(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Expand files, folders, globs, fsspec URLs and `datasets` names into the sorted list of what to read.

    A folder gives its Parquet, Arrow, JSONL and CSV files at any depth, without hidden ones (`.x`, `_x`) and without
    those of a run; a folder written by `Dataset.save_to_disk` is one data set. What exists as a path is never looked up
    on the hub. `OWNER/NAME[@REVISION][:SPLIT]` is a data set of the hub, `FOLDER:SPLIT` one split of a saved dict.

    Raises:
        AuditError: an input that does not exist, holds no captions, or has an unsupported extension.
    """
    found = {source.path: source for text in inputs for source in _expand(check_name(os.fspath(text)))}
    for path in found:
        check_name(path)
    if not found:
        raise AuditError("no caption files given: pass files, folders, globs or data set names")
    return [found[path] for path in sorted(found)]


def _expand(text: str) -> list[Source]:
    try:
        fs, path = fsspec.core.url_to_fs(text)
        local = isinstance(fs, LocalFileSystem)
        path = os.path.normpath(path) if local else path  # `../data/x` and `x` are one file
        if fs.isfile(path):
            return [Source(path if local else text, _format(text))]
        if fs.isdir(path):
            if _is_saved_dataset(fs, path):
                return [Source(path if local else text, "dataset")]
            files = _visible(list_tree(fs, path), path)
        elif any(letter in text for letter in "*?["):
            fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            files = _visible(_matching(fs, path, fixed), fixed)
        else:
            return [_missing(text, fs, path)]
    except AuditError:
        raise
    except Exception as error:  # every file system driver has its own exceptions
        raise AuditError(f"{text}: cannot be listed: {first_line(error)}") from error
    # Statistics and settings lie beside data as .json: read where asked for by name only.
    json_asked = text.lower().endswith(_JSON)
    files = [name for name in files if (ext := _extension(name)) and (json_asked or ext not in _JSON)]
    if not files:
        raise AuditError(f"{text}: no file there that captions are read from: {', '.join(FORMATS)}")
    return [Source(name if local else fs.unstrip_protocol(name), _format(name)) for name in files]


def _matching(fs: Any, pattern: str, fixed: str) -> list[str]:
    """Files that match a glob; locally links to folders are followed, as fsspec does not. `fixed`: its plain part."""
    if not isinstance(fs, LocalFileSystem):
        return [name for name, info in fs.glob(pattern, detail=True).items() if info["type"] == "file"]
    if "**" in pattern:
        like = re.compile(glob_translate(pattern))
        return [name for name in _visible(list_tree(fs, fixed or "/"), fixed) if like.match(name)]
    return [name for name in glob.glob(pattern) if os.path.isfile(name)]


def _missing(text: str, fs: Any, path: str) -> Source:
    """What a text that is no path can still mean: a split of a saved dict, or a name on the hub."""
    folder, _, split = path.rpartition(":")
    if folder and split and fs.isdir(folder) and _is_saved_dataset(fs, folder):
        return Source(path if isinstance(fs, LocalFileSystem) else text, "dataset")
    if HUB_NAME.fullmatch(text) and _extension(text) is None and not text.startswith("."):
        return Source(text, "dataset")
    raise AuditError(f"{text}: no such file or folder")


def _is_saved_dataset(fs: Any, folder: str) -> bool:
    return bool(fs.exists(f"{folder}/dataset_dict.json") or fs.exists(f"{folder}/state.json"))


def _visible(names: Iterable[str], root: str) -> list[str]:
    """Without hidden files, and without what this program wrote: `scan .` must not read its own scores."""
    names = list(names)
    runs = tuple(name.removesuffix(mark) for name in names for mark in _OURS if name.endswith(f"/{mark}"))
    below = len(root.rstrip("/")) + 1
    hidden = {name for name in names if any(part.startswith((".", "_")) for part in name[below:].split("/"))}
    return [name for name in names if name not in hidden and not name.startswith(runs)]


def _extension(path: str) -> str | None:
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    return next((ext for ext in sorted(FORMATS, key=len, reverse=True) if name.endswith(ext)), None)


def _format(path: str) -> str:
    extension = _extension(path)
    if extension is None:
        raise AuditError(f"{path}: unsupported kind of file; captions are read from {', '.join(FORMATS)}")
    return FORMATS[extension]


# --- describing -------------------------------------------------------------------------------------------------


def describe(
    source: Source, caption_col: str | None, flag: str = "--caption-col"
) -> tuple[CaptionFile, pa.Schema, bool]:
    """Look into one source: footers, first lines, columns. Only text formats are read whole, to be hashed.

    `flag` is what names the column on the command line, for messages.

    Returns:
        the file, with rows -1 where only reading it all would tell; its columns (all of them strings for JSONL and
        CSV); and whether it has no random access and must be staged.

    Raises:
        AuditError: not there, not what its name says, cut short, without a caption column that is text.
    """
    path = source.path
    streamed, rows, size = True, -1, 0
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
                schema = pa.schema([(name, pa.string()) for name in text_columns(path, file, source.format)])
            sha256 = content_digest(file, size, whole=streamed)
    column = find_caption_column(path, schema, caption_col, flag)
    return CaptionFile(path, source.format, rows, size, sha256, column), schema, streamed


def find_caption_column(path: str, schema: pa.Schema, named: str | None, flag: str = "--caption-col") -> str:
    """The caption column: the one named, else the first of CAPTION_COLUMNS that is there and is text.

    Raises:
        AuditError: there is none, there are two of the name, or it is not text.
    """
    has = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")
    if named is not None:
        candidates = [name for name in schema.names if name == named]
        if not candidates:
            raise AuditError(f"{path}: no column {named!r}; it has {has}: pass another {flag}")
    else:
        lower = [name.lower() for name in CAPTION_COLUMNS]
        candidates = [name for name in CAPTION_COLUMNS if name in schema.names]
        candidates += sorted((n for n in schema.names if n.lower() in lower), key=lambda n: lower.index(n.lower()))
        if not candidates:
            raise AuditError(f"{path}: no caption column; it has {has}: pass {flag} NAME")
    name = next(
        (n for n in candidates if all(is_text(schema.field(i).type) for i in schema.get_all_field_indices(n))), None
    )
    if name is None:
        kind = schema.field(schema.get_all_field_indices(candidates[0])[0]).type
        raise AuditError(f"{path}: column {candidates[0]!r} is {kind}, not text; it has {has}: pass {flag} NAME")
    if len(schema.get_all_field_indices(name)) > 1:
        raise AuditError(f"{path}: two columns are called {name!r}: rename one")
    return name


def is_text(kind: pa.DataType) -> bool:
    """string, large_string, string_view or a dictionary of these."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_head(path: str, kind: str, head: bytes) -> None:
    if not head:
        raise AuditError(f"{path}: the file is empty (0 bytes)")
    if head.startswith(b"version https://git-lfs"):
        raise AuditError(f"{path}: a git-LFS pointer, not the file itself: run `git lfs pull`")
    if kind == "parquet" and not head.startswith(b"PAR1"):
        raise AuditError(f"{path}: not a Parquet file: it starts with {head[:16]!r}")


def _parquet_facts(path: str, file: IO[bytes], size: int) -> tuple[int, pa.Schema]:
    if size < 12 or _at(file, size - 4, 4) != b"PAR1":
        raise AuditError(f"{path}: the Parquet file is cut short ({size} bytes, no footer at its end): get it again")
    parquet = pq.ParquetFile(file)
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
