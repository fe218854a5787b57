"""be-audit: which captions a text-to-image model reproduces training images for, where, and proof.

The jobs of the commands are functions of the same names: `audit.scan(ScanConfig(...))` and so on. What they need is
imported when they are called, so that `import audit` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

_API = {
    "AuditError": "audit.errors",
    "Run": "audit.run",
    "ScanConfig": "audit.scan",
    "ScanSummary": "audit.scan",
    "read_scores": "audit.tables",
    "read_stage": "audit.tables",
}
_JOBS = ("scan",)
__all__ = [*_API, *_JOBS]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'audit' has no attribute {name!r}")
