"""Columns of any Arrow type as captions: which types hold text, and how they become strings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.identity import id_text


def is_text(kind: pa.DataType) -> bool:
    """string, large_string, string_view or a dictionary of these."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_caption(kind: pa.DataType) -> bool:
    """Text, or the bytes of it: writers that know no strings (Impala, old Spark) say binary for both."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return is_text(kind) or any(test(kind) for test in binary)


def is_caption_list(kind: pa.DataType) -> bool:
    """A list of captions, of any layout."""
    return is_list(kind) and is_caption(kind.value_type)


def is_list(kind: pa.DataType) -> bool:
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, *views)
    return any(test(kind) for test in lists)


def is_empty(captions: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Which captions are null, empty or only whitespace: bool [n]."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(captions)), 0)
    return np.asarray(pc.fill_null(blank, True).to_numpy(zero_copy_only=False), bool)


def caption_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A caption column as `text` gives it; null throughout where it is a column of nothing but NaN."""
    return pa.nulls(len(column), pa.string()) if pa.types.is_floating(column.type) else text(column)


def decoded(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column with the values of its dictionary written out; one without a dictionary as it is."""
    if not pa.types.is_dictionary(column.type):
        return column
    kind = column.type.value_type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # which nothing can be taken from
        kind = pa.large_string() if is_text(kind) else pa.large_binary()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return pa.chunked_array([chunk.dictionary.cast(kind).take(chunk.indices) for chunk in chunks], kind)


def text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one string array, whatever its width or encoding; bytes that are not UTF-8 become U+FFFD.

    Whole numbers are written as such in float columns too (1234567, not 1234567.0: ids of a column with gaps), NaN
    becomes null.
    """
    column = decoded(column)
    if pa.types.is_floating(column.type):
        return pa.array([id_text(value) for value in column.to_pylist()], pa.string())
    if is_caption(column.type) and not is_text(column.type):
        column = _one(column.cast(pa.binary())).view(pa.string())  # a cast would refuse what is not UTF-8
    column = _one(column.cast(pa.string()))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        column = pa.array([value if value is None else value.decode(errors="replace") for value in values], pa.string())
    return column


def one_caption_a_row(lists: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Lists of captions as a caption a row, and the row each comes from; an empty or null list is a row without one."""
    lists = _one(lists)
    kind = lists.type.value_type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # which nothing can be taken from
        lists = lists.cast(pa.large_list(pa.large_string() if is_text(kind) else pa.large_binary()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    filled = lists.filter(pa.array(lengths > 0))  # what a null or a slice leaves behind its lists is gone with it
    flat = filled.flatten()
    rows = np.repeat(np.arange(len(lists)), np.maximum(lengths, 1))
    place = np.cumsum(np.repeat(lengths > 0, np.maximum(lengths, 1))) - 1
    empty = np.repeat(lengths == 0, np.maximum(lengths, 1))
    return flat.take(pa.array(place, pa.int64(), mask=empty)), pa.array(rows, pa.int64())


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
