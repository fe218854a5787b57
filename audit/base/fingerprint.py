"""What a run or an index was made from: its digest, and the difference between two in words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from audit.base.errors import AuditError


def digest(facts: dict[str, Any]) -> str:
    """sha256 of the facts as canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a local file's content."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()


def diff_lines(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a field that differs: `descriptor.sha256: a1b2 -> c3d4`. Lists are compared item by item."""
    before, after = _flat(old), _flat(new)
    names = sorted({*before, *after})
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in names
        if before.get(name, "absent") != after.get(name, "absent")
    ]


def refuse_other(url: str, theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    """Raise AuditError with one line a field that differs; nothing where they are the same."""
    lines = diff_lines(theirs, ours)
    if lines:
        raise AuditError(
            f"{url}: {what}; nothing was touched. What differs (there -> now):\n  "
            + "\n  ".join(lines[:40])
            + "\nGive the same flags and files to go on with it, or another -o for a new one."
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = {str(key): item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        items = {str(key): item for key, item in enumerate(value)}
    else:
        return {name: value}
    return {k: v for key, item in items.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
