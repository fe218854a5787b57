"""What touches a diffusion model: loading, attention capture, scores, sampling, mitigation. Knows no files or runs."""

from pipelines.attention import MaskSource
from pipelines.first_step import FirstStepScorer, FirstStepScores
from pipelines.loading import DiffusionModel, ModelError, find_model, load
from pipelines.trajectory import Trajectories, TrajectorySampler

__all__ = [
    "DiffusionModel",
    "FirstStepScorer",
    "FirstStepScores",
    "MaskSource",
    "ModelError",
    "Trajectories",
    "TrajectorySampler",
    "find_model",
    "load",
]
