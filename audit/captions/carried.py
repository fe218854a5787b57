"""Which input columns a run carries through, and the one type each has over all files."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from audit.base.errors import AuditError
from audit.base.identity import is_identity
from audit.captions.files import Described
from audit.captions.rows import find_column
from audit.captions.values import is_caption, is_text


def carried_schema(
    described: list[Described], named: Sequence[str] | None, reserved: Collection[str]
) -> tuple[pa.Schema, list[str]]:
    """The columns to carry through over all files, in order of appearance, one type each; and what cannot be.

    Raises:
        AuditError: a column that was named cannot be carried. One that nobody named is a note.
    """
    names, notes = _identities(described, reserved) if named is None else (_named(named, reserved), [])
    fields = []
    for name in names:
        found = [
            (file.path, schema.field(at).type)
            for file, schema, *_ in described
            if (at := find_column(schema, name)) >= 0
        ]
        if not found and named is not None:
            has = ", ".join(described[0].schema.names[:20])
            raise AuditError(
                f"--keep-cols {name}: no input has one column of that name (JSONL: in its first 100,000 lines); "
                f"{described[0].file.path} has {has}"
            )
        kinds = {_plain(kind): path for path, kind in found if not pa.types.is_null(kind)}
        odd = next((kind for kind in kinds if not _is_plain(kind)), None)
        if not found:
            notes.append(f"{name} is not carried: several columns have that name")
        elif odd is None or (named is not None and len(kinds) == 1 and not (is_identity(name) and _is_nested(odd))):
            fields.append(pa.field(name, _common_type(list(kinds), is_identity(name))))
        elif named is None:
            notes.append(f"{name} is not carried: it is {odd} in {kinds[odd]}")
        elif len(kinds) == 1:
            raise AuditError(f"{kinds[odd]}: column {name!r} is {odd}, no text and no number: name other --keep-cols")
        else:
            other = next(kind for kind in kinds if kind != odd)
            raise AuditError(
                f"{kinds[odd]}: column {name!r} is {odd}, in {kinds[other]} {other}: name other --keep-cols"
            )
    return pa.schema(fields), notes


def _identities(described: list[Described], reserved: Collection[str]) -> tuple[list[str], list[str]]:
    """URL, key and id-like columns of all files as first spelled, and what of them no run can carry."""
    wanted: dict[str, str] = {}
    notes: dict[str, None] = {}
    for file, schema, *_ in described:
        here: dict[str, str] = {}
        for name in schema.names:
            lower = name.lower()
            if not is_identity(name) or name == file.caption_col:
                continue
            if lower in reserved:
                notes[f"{name} is not carried: a run has a column of that name itself"] = None
            elif here.setdefault(lower, name) != name:
                notes[f"{name} is not carried: it differs from {here[lower]} in case alone, and SQL knows one"] = None
            else:
                wanted.setdefault(lower, name)
    return list(wanted.values()), list(notes)


def _named(named: Sequence[str], reserved: Collection[str]) -> list[str]:
    names = list(dict.fromkeys(named))
    for name in names:
        if name.lower() in reserved:
            raise AuditError(f"--keep-cols {name}: a run has a column of that name itself: rename the input's")
        if sum(name.lower() == other.lower() for other in names) > 1:
            raise AuditError(f"--keep-cols {name}: another of the columns differs in case alone: SQL knows one")
    return names


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without its encoding: text and decimals (ids of databases) as string, a dictionary as its values."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if is_text(kind) or pa.types.is_decimal(kind) else kind


def _is_plain(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def _is_nested(kind: pa.DataType) -> bool:
    """What joins by key and by URL cannot make text of."""
    return pa.types.is_nested(kind) or pa.types.is_fixed_size_binary(kind) or is_caption(kind)


def _common_type(kinds: list[pa.DataType], identity: bool) -> pa.DataType:
    """string for text, int64 for integers of several widths, string for what differs otherwise: ids stay exact.

    Ids that are floats throughout are text too: 1e12 is one key, however it is written elsewhere.
    """
    if len(kinds) <= 1:
        kind = kinds[0] if kinds else pa.string()
        return pa.string() if identity and pa.types.is_floating(kind) else kind
    if all(pa.types.is_integer(kind) and kind != pa.uint64() for kind in kinds):
        return pa.int64()
    return pa.string()
