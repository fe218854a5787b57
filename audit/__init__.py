"""be-audit: which captions a text-to-image model reproduces training images for, where, and proof.

The jobs of the commands are functions of the same names: `audit.scan(audit.ScanConfig(...))` and so on. Names are
imported when they are asked for, so `import audit` is light. The folders, each importing only from those before it:

base/ testbed/ captions/ index/ statistics/ engines/ run/ scores/ verdicts/ evaluation/ mitigation/ reports/ cli/
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; without it every name is Any
    from audit.base.errors import AuditError as AuditError
    from audit.base.errors import Broken as Broken
    from audit.base.errors import Drained as Drained
    from audit.evaluation.config import EvaluateConfig as EvaluateConfig
    from audit.evaluation.evaluate import evaluate as evaluate
    from audit.index import Index as Index
    from audit.index import IndexConfig as IndexConfig
    from audit.index import build_index as build_index
    from audit.mitigation.mitigate import MitigateConfig as MitigateConfig
    from audit.mitigation.mitigate import mitigate as mitigate
    from audit.reports.report import ReportConfig as ReportConfig
    from audit.reports.report import report as report
    from audit.run.read import read_scores as read_scores
    from audit.run.read import read_stage as read_stage
    from audit.run.run import Run as Run
    from audit.run.verify import verify_run as verify_run
    from audit.scores.calibrate import CalibrateConfig as CalibrateConfig
    from audit.scores.calibrate import calibrate as calibrate
    from audit.scores.prompt import ScoreConfig as ScoreConfig
    from audit.scores.prompt import score as score
    from audit.scores.scan import ScanConfig as ScanConfig
    from audit.scores.scan import ScanSummary as ScanSummary
    from audit.scores.scan import scan as scan
    from audit.verdicts.confirm import ConfirmConfig as ConfirmConfig
    from audit.verdicts.confirm import confirm as confirm

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
