"""The testbed's folder: its parts read from it, the diffusers pipeline written into it.

TESTBED/pipeline/ (diffusers), TESTBED/clip/ (transformers), TESTBED/copy_descriptor.torchscript.pt
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DESCRIPTOR = "copy_descriptor.torchscript.pt"
NOISE: dict[str, Any] = {  # Stable Diffusion 1's schedule
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class Parts:
    """What the U-Net is trained and sampled with, float32 and frozen."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    text: CLIPTextModel


def load_parts(folder: Path) -> Parts:
    """Tokenizer, VAE and the text half of the CLIP."""
    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    vae = (
        AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", low_cpu_mem_usage=False)
        .float()
        .eval()
        .requires_grad_(False)
    )
    clip = CLIPModel.from_pretrained(folder / "clip").float()
    text = CLIPTextModel(clip.config.text_config).eval().requires_grad_(False)
    weights = clip.state_dict()  # transformers 5 dropped the prefix from the text model alone
    text.load_state_dict({k: weights[k if k in weights else f"text_model.{k}"] for k in text.state_dict()})
    return Parts(CLIPTokenizer.from_pretrained(folder / "pipeline" / "tokenizer"), vae, text)


def save_pipeline(folder: Path, parts: Parts, unet: UNet2DConditionModel) -> None:
    """Write TESTBED/pipeline as a `StableDiffusionPipeline` in float16; the parts are float16 afterwards."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "pipeline", safe_serialization=True)
