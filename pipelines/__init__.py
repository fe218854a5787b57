"""What touches a diffusion model: loading, attention capture, scores, sampling, mitigation. Knows no files or runs.

Names are imported when they are asked for: a program that only wants the list of detectors does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; without it every name is Any
    from pipelines import formulas as formulas
    from pipelines.attention import MaskSource as MaskSource
    from pipelines.detectors import FirstStep as FirstStep
    from pipelines.detectors import detector as detector
    from pipelines.errors import ModelError as ModelError
    from pipelines.first_step import FirstStepScorer as FirstStepScorer
    from pipelines.first_step import FirstStepScores as FirstStepScores
    from pipelines.folders import find_model as find_model
    from pipelines.loading import load as load
    from pipelines.mitigated_pipeline import MitigatedPipeline as MitigatedPipeline
    from pipelines.mitigation import Mitigation as Mitigation
    from pipelines.mitigation import Mitigator as Mitigator
    from pipelines.model import DiffusionModel as DiffusionModel
    from pipelines.trajectory import Trajectories as Trajectories
    from pipelines.trajectory import TrajectorySampler as TrajectorySampler

_API = {
    "DiffusionModel": "pipelines.model",
    "FirstStep": "pipelines.detectors",
    "FirstStepScorer": "pipelines.first_step",
    "FirstStepScores": "pipelines.first_step",
    "MaskSource": "pipelines.attention",
    "MitigatedPipeline": "pipelines.mitigated_pipeline",
    "Mitigation": "pipelines.mitigation",
    "Mitigator": "pipelines.mitigation",
    "ModelError": "pipelines.errors",
    "Trajectories": "pipelines.trajectory",
    "TrajectorySampler": "pipelines.trajectory",
    "detector": "pipelines.detectors",
    "find_model": "pipelines.folders",
    "load": "pipelines.loading",
}
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    if name == "formulas":  # for pipelines.detectors, whose names and columns must be had without torch
        return importlib.import_module("pipelines.formulas")
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
