"""Which input columns a run carries through, and the one type each has over all files."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from audit.base.errors import AuditError
from audit.base.identity import is_identity
from audit.captions.files import Described, is_text
from audit.captions.rows import find_column


def carried_schema(
    described: list[Described], named: Sequence[str] | None, reserved: Collection[str]
) -> tuple[pa.Schema, list[str]]:
    """The columns to carry through over all files, in order of appearance, one type each; and what cannot be."""
    notes: list[str] = []
    if named is None:
        wanted = {
            column.name.lower(): column.name
            for file, schema, *_ in reversed(described)
            for column in reversed(list(schema))
            if is_identity(column.name) and column.name != file.caption_col and _is_plain(column.type)
        }
        names = [name for lower, name in reversed(wanted.items()) if lower not in reserved]
    else:
        names = list(dict.fromkeys(named))
        for name in names:
            if name.lower() in reserved:
                raise AuditError(f"--keep-cols {name}: a run has a column of that name itself: rename the input's")
            if sum(name.lower() == other.lower() for other in names) > 1:
                raise AuditError(f"--keep-cols {name}: another of the columns differs in case alone: SQL knows one")
    fields = []
    for name in names:
        found = [
            (file.path, schema.field(at).type)
            for file, schema, *_ in described
            if (at := find_column(schema, name)) >= 0
        ]
        if not found and named is None:
            notes.append(f"{name} is not carried: several columns have that name")
            continue
        if not found:
            has = ", ".join(described[0].schema.names[:20])
            raise AuditError(
                f"--keep-cols {name}: no input has one column of that name (JSONL: in its first 100,000 lines); "
                f"{described[0].file.path} has {has}"
            )
        fields.append(pa.field(name, _common_type(name, found)))
    return pa.schema(fields), notes


def _is_plain(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _common_type(name: str, found: list[tuple[str, pa.DataType]]) -> pa.DataType:
    """string for text, int64 for integers of several widths, string for what differs otherwise: ids stay exact."""
    kinds = {pa.string() if is_text(kind) else kind: path for path, kind in found if not pa.types.is_null(kind)}
    if len(kinds) <= 1:
        return next(iter(kinds), pa.string())
    if all(pa.types.is_integer(kind) and kind != pa.uint64() for kind in kinds):
        return pa.int64()
    odd = next((kind for kind in kinds if not (_is_plain(kind) or pa.types.is_boolean(kind))), None)
    if odd is not None:
        other = next(kind for kind in kinds if kind != odd)
        raise AuditError(f"{kinds[odd]}: column {name!r} is {odd}, in {kinds[other]} {other}: name other --keep-cols")
    return pa.string()
