"""JSON files of our own (run.json, stages/NAME.json, index_info.json), read and checked as dataclasses in one place."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, TypeVar

from audit.base.errors import AuditError

Facts = TypeVar("Facts")


@functools.cache
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_facts(kind: type[Facts], data: bytes | str | dict[str, Any], where: str) -> Facts:
    """A dataclass from JSON, every field of its type; fields it does not know are left out.

    Args:
        kind: a dataclass. data: JSON, or an object already parsed. where: the file, for the message.

    Raises:
        AuditError: no JSON, a field that is missing or of another type.
    """
    from pydantic import ValidationError

    key: Any = kind
    try:
        if isinstance(data, dict):
            found: Facts = _adapter(key).validate_python(data)
        else:
            found = _adapter(key).validate_json(data)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise AuditError(
            f"{where}: cannot be read: {field}: {first['msg']}: restore it or use another folder"
        ) from error


def to_json(facts: Any) -> bytes:
    """A dataclass as indented JSON."""
    return json.dumps(dataclasses.asdict(facts), indent=1).encode()
