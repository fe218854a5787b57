"""What touches a diffusion model: loading, attention capture, scores, sampling, mitigation. Knows no files or runs."""

from pipelines.attention import MaskSource
from pipelines.first_step import FirstStepScorer, FirstStepScores
from pipelines.loading import DiffusionModel, ModelError, find_model, load
from pipelines.mitigated_pipeline import MitigatedPipeline
from pipelines.mitigation import Mitigation, Mitigator
from pipelines.trajectory import Trajectories, TrajectorySampler

__all__ = [
    "DiffusionModel",
    "FirstStepScorer",
    "FirstStepScores",
    "MaskSource",
    "MitigatedPipeline",
    "Mitigation",
    "Mitigator",
    "ModelError",
    "Trajectories",
    "TrajectorySampler",
    "find_model",
    "load",
]
