"""Families of models, one file each: how prompts are encoded, how the denoiser is called, where attention is read.

stable_diffusion.py    Stable Diffusion 1 and 2, and models distilled from them with a guidance embedding
stable_diffusion_xl.py Stable Diffusion XL, Playground v2.5 and other weights of its shape
pixart.py              PixArt alpha and Sigma
stable_diffusion_3.py  Stable Diffusion 3 and 3.5
sana.py                Sana
deepfloyd_if.py        DeepFloyd IF, stage I

A new family is a subclass of `pipelines.model.DiffusionModel` named in FAMILIES.
"""

from __future__ import annotations

from pipelines.families.deepfloyd_if import DeepFloydIF
from pipelines.families.pixart import PixArtAlpha, PixArtSigma
from pipelines.families.sana import Sana
from pipelines.families.stable_diffusion import StableDiffusion
from pipelines.families.stable_diffusion_3 import StableDiffusion3
from pipelines.families.stable_diffusion_xl import StableDiffusionXL
from pipelines.model import DiffusionModel

FAMILIES: tuple[type[DiffusionModel], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    PixArtAlpha,
    PixArtSigma,
    StableDiffusion3,
    Sana,
    DeepFloydIF,
)


def find_family(class_name: str) -> type[DiffusionModel] | None:
    """The family that reads a pipeline class, or None."""
    return next((family for family in FAMILIES if class_name in family.pipelines), None)


def supported() -> list[str]:
    """The text-to-image pipeline class of every family, for messages."""
    return [family.pipelines[0] for family in FAMILIES]
