"""be-audit: which captions a text-to-image model reproduces training images for, where, and proof.

The jobs of the commands are functions of the same names: `audit.scan(audit.ScanConfig(...))` and so on. Names are
imported when they are asked for, so `import audit` is light. The folders, each importing only from those before it:

base/ testbed/ captions/ index/ statistics/ engines/ run/ scores/ verdicts/ evaluation/ mitigation/ reports/ cli/
"""

from __future__ import annotations

import importlib
from typing import Any

_API = {
    "AuditError": "audit.base.errors",
    "Broken": "audit.base.errors",
    "CalibrateConfig": "audit.scores.calibrate",
    "ConfirmConfig": "audit.verdicts.confirm",
    "Drained": "audit.base.errors",
    "EvaluateConfig": "audit.evaluation.config",
    "Index": "audit.index",
    "IndexConfig": "audit.index",
    "MitigateConfig": "audit.mitigation.mitigate",
    "ReportConfig": "audit.reports.report",
    "Run": "audit.run.run",
    "ScanConfig": "audit.scores.scan",
    "ScanSummary": "audit.scores.scan",
    "ScoreConfig": "audit.scores.prompt",
    "build_index": "audit.index",
    "calibrate": "audit.scores.calibrate",
    "confirm": "audit.verdicts.confirm",
    "evaluate": "audit.evaluation.evaluate",
    "mitigate": "audit.mitigation.mitigate",
    "read_scores": "audit.run.read",
    "read_stage": "audit.run.read",
    "report": "audit.reports.report",
    "scan": "audit.scores.scan",
    "score": "audit.scores.prompt",
    "verify_run": "audit.run.verify",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'audit' has no attribute {name!r}")
