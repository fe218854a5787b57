"""be-audit: which captions a text-to-image model reproduces training images for, where, and proof.

The jobs of the commands are functions of the same names, `audit.scan(ScanConfig(...))` and so on, and live in modules
of the same names, `from audit.scan import ScanConfig`. Both are imported when asked for, so `import audit` is light.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_JOBS = ("scan", "confirm", "report", "evaluate", "calibrate", "mitigate", "score")
_API = {
    **{job: f"audit.{job}" for job in _JOBS},
    "AuditError": "audit.errors",
    "Broken": "audit.errors",
    "CalibrateConfig": "audit.calibrate",
    "ConfirmConfig": "audit.confirm",
    "Drained": "audit.errors",
    "EvaluateConfig": "audit.evaluate",
    "Index": "audit.index",
    "IndexConfig": "audit.index",
    "MitigateConfig": "audit.mitigate",
    "ReportConfig": "audit.report",
    "Run": "audit.run",
    "ScanConfig": "audit.scan",
    "ScanSummary": "audit.scan",
    "ScoreConfig": "audit.score",
    "build_index": "audit.index",
    "read_scores": "audit.tables",
    "read_stage": "audit.tables",
    "verify_run": "audit.verify",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'audit' has no attribute {name!r}")


class _Package(types.ModuleType):
    """`audit.scan` is the function, whatever has been imported: a submodule does not take its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _JOBS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
