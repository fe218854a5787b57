"""Sources that are tables: parquet and `datasets` with image bytes, parquet with embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audit.base.errors import AuditError, check_machine
from audit.base.identity import KEYS, ROW_NUMBERS, TITLES, URLS, caption_columns, id_text
from audit.base.parquet import open_parquet
from audit.index.items import (
    EMBEDDINGS,
    KEY,
    NUMBER,
    PLACE,
    Columns,
    Item,
    Slice,
    TooLarge,
    check_size,
    files_mark,
    read_file,
    slices,
)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "image_bytes", "content")
EMBEDDING_COLUMNS = ("embedding", "embeddings", "image_embedding", "img_emb", "sscd", "vector", "feature", "features")
BATCH = 256  # rows of pictures decoded from parquet at once, where they are small
_BATCH_BYTES = 16 << 20  # and at most about so many bytes
_KEPT_BYTES = 512 << 20  # of row groups' pictures that are kept for the next one looked at; half of it one at most


def is_image(kind: pa.DataType) -> bool:
    """Encoded pictures: binary, or the struct {bytes, path} of `datasets`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_embedding(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and pa.types.is_floating(kind.value_type)


def pick(schema: pa.Schema, named: str | None, names: tuple[str, ...], where: str, flag: str) -> str | None:
    """The column the user named, else the first of `names` there is, whatever its case.

    Raises:
        AuditError: the named column is not there.
    """
    if named is not None:
        if named not in schema.names:
            raise AuditError(f"{where}: has no column {named!r}; it has {', '.join(schema.names)}: pass --{flag}")
        return named
    lower = {name.lower(): name for name in reversed(schema.names)}
    return next((lower[name] for name in names if name in lower), None)


def pick_typed(schema: pa.Schema, named: str | None, names: tuple[str, ...], test: Any, where: str) -> str | None:
    """As `pick`, of one type; without a known name, the only column of that type."""
    typed = pa.schema([field for field in schema if test(field.type)])
    if named is not None and named in schema.names and named not in typed.names:
        return None
    found = pick(typed if named is None else schema, named, names, where, "image-col")
    return found or (typed.names[0] if len(typed) == 1 else None)


class Described:
    """The columns that describe a row, resolved against one schema: captions as a scan of the same table finds them.

    Args:
        blank: columns that hold nothing; captions are not looked for in them where others could hold them.
    """

    def __init__(self, schema: pa.Schema, columns: Columns, where: str, blank: Collection[str] = ()) -> None:
        self.url = pick(schema, columns.url, URLS, where, "url-col")
        names = caption_columns(schema.names)
        names = [name for name in names if name not in blank] or names
        self.caption = names[0] if names and columns.caption is None else None
        self.caption = self.caption or pick(schema, columns.caption, TITLES, where, "caption-col")
        self.key = pick(schema, columns.key, (*KEYS, *ROW_NUMBERS), where, "key-col")
        bare = self.key is not None and columns.key is None and self.key.lower() in ROW_NUMBERS
        self.key_from = NUMBER if bare else KEY
        self.names = [name for name in dict.fromkeys((self.url, self.caption, self.key)) if name]

    def __str__(self) -> str:
        return f"captions from {self.caption or 'none'}, URLs from {self.url or 'none'}, keys from {self.key or 'none'}"

    def item(self, row: dict[str, Any], number: int) -> Item:
        def text(name: str | None) -> str | None:
            return id_text(row.get(name)) if name else None

        key = text(self.key)
        return Item(key or str(number), text(self.url), text(self.caption), key_from=self.key_from if key else PLACE)


class ParquetSource:
    """Parquet files with encoded pictures or with embeddings."""

    def __init__(self, url: str, files: list[str], columns: Columns) -> None:
        self.url = url
        self.files = {path: parquet_facts(path) for path in files}
        self.image = self._find(columns.image, IMAGE_COLUMNS, is_image)
        self.embedding = None
        if self.image is None:
            self.embedding = self._find(columns.image, EMBEDDING_COLUMNS, is_embedding)
        if self.image is None and self.embedding is None:
            names = ", ".join(self.files[files[0]][1].names)
            raise AuditError(f"{files[0]}: no column of encoded pictures or embeddings among {names}: pass --image-col")
        self.kind = "parquet" if self.image else EMBEDDINGS
        self.described = {path: Described(facts[1], columns, path, facts[3]) for path, facts in self.files.items()}
        wanted = self.image or self.embedding
        for path, (rows, schema, *_) in self.files.items():
            if rows and wanted not in schema.names:
                raise AuditError(f"{path}: has no column {wanted!r}, which {files[0]} has: pass --image-col")

    def _find(self, named: str | None, names: tuple[str, ...], test: Any) -> str | None:
        """The column of the first file that has one: in a part without rows or pictures columns have no type."""
        found = (pick_typed(facts[1], named, names, test, path) for path, facts in self.files.items() if facts[0])
        return next((name for name in found if name is not None), None)

    def facts(self) -> dict[str, Any]:
        footers = "".join(footer for _, _, footer, _ in self.files.values())
        digest = hashlib.sha256(footers.encode()).hexdigest()[:16]
        rows = sum(facts[0] for facts in self.files.values())
        column = self.image or self.embedding
        return {
            "kind": self.kind,
            "url": self.url,
            "files": len(self.files),
            "rows": rows,
            "column": column,
            "footers": digest,
        }

    def columns(self) -> str:
        return "; or ".join(dict.fromkeys(map(str, self.described.values())))

    def parts(self, rows: int) -> list[Slice]:
        return [part for path, facts in self.files.items() for part in slices(facts[0], rows, path)]

    def mark(self, part: Slice) -> str:
        return files_mark([part.file])

    def items(self, part: Slice) -> Iterator[Item]:
        described = self.described[part.file]
        names = described.names + ([self.image] if self.image else [])
        if not names:
            yield from (Item(str(part.start + i), locator={}, key_from=PLACE) for i in range(part.count))
            return
        for number, row in self._rows(part, names):
            item = described.item(row, number)
            item.locator = {}
            if self.image:
                item.locator = {"file": part.file, "row": number, "column": self.image}
                item.data, item.error = cell_bytes(row[self.image])
            yield item

    def vectors(self, part: Slice) -> np.ndarray | None:
        if self.embedding is None:
            return None
        return stack([row[self.embedding] for _, row in self._rows(part, [self.embedding])])

    def _rows(self, part: Slice, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of a part by row group, a batch at a time: a row group of pictures may be larger than memory."""
        with fsspec.open(part.file, "rb") as opened:
            file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)  # else whole column chunks are held
            first, end = 0, part.start + part.count
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < end and first + rows > part.start:
                    number = first
                    size = _batch(file.metadata.row_group(group))
                    for batch in file.iter_batches(size, row_groups=[group], columns=names):
                        if number + len(batch) > part.start and number < end:
                            for offset, row in enumerate(batch.to_pylist()):
                                if part.start <= number + offset < end:
                                    yield number + offset, row
                        number += len(batch)
                first += rows


def _batch(group: Any) -> int:
    """Rows decoded at once of a row group: its pictures may be large."""
    return int(max(1, min(BATCH, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1))))


def parquet_facts(path: str) -> tuple[int, pa.Schema, str, list[str]]:
    """Rows, schema, hash of the footer, columns that by their statistics hold nothing."""
    try:
        with fsspec.open(path, "rb") as opened:
            file = open_parquet(path, opened)
            facts = file.metadata.num_rows, file.schema_arrow
            blank = _blank(file.metadata)
            opened.seek(-8, 2)
            length = int.from_bytes(opened.read(4), "little")
            opened.seek(-(8 + length), 2)
            return *facts, hashlib.sha256(opened.read()).hexdigest(), blank
    except (pa.ArrowInvalid, OSError) as error:
        check_machine(path, error)
        raise AuditError(f"{path}: not a whole parquet file: {str(error).splitlines()[0]}") from error


def _blank(metadata: pq.FileMetaData) -> list[str]:
    """Flat columns of nothing but nulls."""
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    found = []
    for at in range(metadata.num_columns):
        chunks = [group.column(at) for group in groups]
        known = [each.statistics.null_count for each in chunks if each.statistics and each.statistics.has_null_count]
        if len(known) == len(chunks) and sum(known) == metadata.num_rows:
            found.append(metadata.schema.column(at).path)
    return found


def holds_pictures(path: str) -> bool:
    """Whether a parquet file has a column of encoded pictures."""
    return any(is_image(field.type) for field in parquet_facts(path)[1])


def cell_bytes(value: Any) -> tuple[bytes | None, str | None]:
    """The encoded picture of a cell, or why there is none."""
    if isinstance(value, dict):
        path = value.get("path")
        if value.get("bytes") is None and path:
            if "://" in path or "::" in path:
                return None, f"{path}: a URL in a cell is not fetched"
            try:
                return read_file(path), None
            except (OSError, ValueError) as error:
                return None, str(error)
        value = value.get("bytes")
    if not value:
        return None, "no picture in this row"
    try:
        check_size(len(value))
    except TooLarge as error:
        return None, str(error)
    return value, None


def stack(rows: list[Any]) -> np.ndarray:
    """Lists of floats, some perhaps null or of a wrong length, as float32 [rows, dim]; NaN where unusable."""
    lengths = [len(row) for row in rows if row is not None]
    dim = max(set(lengths), key=lengths.count) if lengths else 1
    out = np.full((len(rows), dim), np.nan, np.float32)
    for i, row in enumerate(rows):
        if row is not None and len(row) == dim:
            out[i] = row
    return out


class DatasetSource:
    """A `datasets` set, from a folder (`save_to_disk`) or a hub name; its split `train` where it has several."""

    kind = "dataset"

    def __init__(self, where: dict[str, Any], columns: Columns) -> None:
        self.where, self.dataset = where, _load_dataset(*where.values())
        name = where["file"]
        schema = self.dataset.features.arrow_schema
        self.image = pick_typed(schema, columns.image, IMAGE_COLUMNS, is_image, name)
        if self.image is None:
            raise AuditError(f"{name}: no column of pictures among {', '.join(schema.names)}: pass --image-col")
        blank = [name for name in schema.names if self.dataset.data.column(name).null_count == len(self.dataset.data)]
        self.described = Described(schema, columns, name, blank)

    def facts(self) -> dict[str, Any]:
        facts = {"kind": self.kind, **self.where, "rows": len(self.dataset), "column": self.image}
        return {**facts, "data": self.dataset._fingerprint}

    def columns(self) -> str:
        return str(self.described)

    def parts(self, rows: int) -> list[Slice]:
        return slices(len(self.dataset), rows)

    def mark(self, part: Slice) -> str:
        return files_mark(file["filename"] for file in self.dataset.cache_files)

    def items(self, part: Slice) -> Iterator[Item]:
        assert self.image is not None
        rows = self.dataset.select_columns(list(dict.fromkeys([*self.described.names, self.image])))
        for number in range(part.start, part.start + part.count):
            row = rows[number]
            item = self.described.item(row, number)
            item.locator = {**self.where, "row": number, "column": self.image}
            item.data, item.error = cell_bytes(row[self.image])
            yield item

    def vectors(self, part: Slice) -> None:
        return None


@lru_cache(maxsize=2)
def _load_dataset(name: str, revision: str | None, split: str | None, hub: bool) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(name, revision=revision) if hub else datasets.load_from_disk(name)
    except Exception as error:  # the hub client raises many unrelated kinds
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "no such file, and no data set of this name could be loaded" if hub else "cannot be loaded as a data set"
        raise AuditError(f"{name}: {what}: {text}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise AuditError(f"{name}: has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    pictures = [key for key, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    for key in pictures:
        loaded = loaded.cast_column(key, datasets.Image(decode=False))
    return loaded


def read_cell(locator: dict[str, Any]) -> bytes:
    """The encoded picture of a table's cell. Raises OSError when there is none."""
    if "hub" in locator:
        where = (locator["file"], locator["revision"], locator["split"], locator["hub"])
        data, error = cell_bytes(_load_dataset(*where)[locator["row"]][locator["column"]])
    else:
        ends = _groups(locator["file"]).ends
        group = int(np.searchsorted(ends, locator["row"], side="right"))
        row = locator["row"] - (int(ends[group - 1]) if group else 0)
        data, error = cell_bytes(_cell(locator["file"], group, row, locator["column"]))
    if data is None:
        raise OSError(error)
    return data


class _Groups(NamedTuple):
    """Of a parquet file's row groups: where each ends, rows decoded at once, bytes in memory."""

    ends: np.ndarray
    batches: list[int]
    sizes: list[int]


@lru_cache(maxsize=256)
def _groups(path: str) -> _Groups:
    with fsspec.open(path, "rb") as opened:
        metadata = pq.ParquetFile(opened).metadata
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    ends = np.cumsum([group.num_rows for group in groups])
    return _Groups(ends, [_batch(group) for group in groups], [group.total_byte_size for group in groups])


def _cell(path: str, group: int, row: int, column: str) -> Any:
    """One value: of a row group that is kept where it is small enough, else of the batch that holds it."""
    facts = _groups(path)
    if facts.sizes[group] <= _KEPT_BYTES // 2:
        return _column(path, group, column)[row].as_py()
    with fsspec.open(path, "rb") as opened:
        file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
        for batch in file.iter_batches(facts.batches[group], row_groups=[group], columns=[column]):
            if row < len(batch):
                return batch.column(0)[row].as_py()
            row -= len(batch)
    raise IndexError(row)


class _Kept:
    """Columns of row groups in memory: those looked at last, up to _KEPT_BYTES in all. Safe for threads."""

    def __init__(self) -> None:
        self.columns: dict[tuple[str, int, str], pa.ChunkedArray] = {}  # the one looked at last at the end
        self.size = 0
        self._lock = Lock()

    def get(self, key: tuple[str, int, str]) -> pa.ChunkedArray | None:
        with self._lock:
            found = self.columns.pop(key, None)
            if found is not None:
                self.columns[key] = found
            return found

    def put(self, key: tuple[str, int, str], column: pa.ChunkedArray) -> None:
        with self._lock:
            if key in self.columns:  # another thread was first
                return
            self.columns[key] = column
            self.size += column.nbytes
            while self.size > _KEPT_BYTES and len(self.columns) > 1:
                self.size -= self.columns.pop(next(iter(self.columns))).nbytes


_kept = _Kept()


def _column(path: str, group: int, column: str) -> pa.ChunkedArray:
    """A row group's column, from memory where it is kept."""
    key = (path, group, column)
    found = _kept.get(key)
    if found is None:
        with fsspec.open(path, "rb") as opened:
            found = pq.ParquetFile(opened).read_row_group(group, columns=[column]).column(0)
        _kept.put(key, found)
    return found
