"""The autoencoder: factor 4, so that 64 x 64 pictures become 16 x 16 x 4 latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tests.recipe.config import Recipe
from tests.recipe.dataset import Pictures
from tests.recipe.drawing import SIZE
from tests.recipe.training import bfloat16, log, train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 20
KL_WEIGHT = 2e-6
MEASURED = 64  # pictures, 65,536 latent values: enough for a scaling factor


def train_vae(pictures: Pictures, recipe: Recipe) -> AutoencoderKL:
    """Pixels, their differences and a little KL; the scaling factor is measured at the end."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=SIZE,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    rng = np.random.default_rng(recipe.seed)

    def loss_of_step() -> Tensor:
        x, _ = pictures.batch(BATCH, rng)
        with bfloat16():
            mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            z = mean + (logvar * 0.5).exp() * torch.randn_like(mean)
            y = vae.decoder(vae.post_quant_conv(z)).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        edges = (y - x).diff(dim=3).abs().mean() + (y - x).diff(dim=2).abs().mean()
        return (y - x).abs().mean() + 0.5 * ((y - x) ** 2).mean() + 0.5 * edges + KL_WEIGHT * kl

    train("vae", optimizer, loss_of_step, recipe.vae_seconds)
    vae.eval().requires_grad_(False)
    with torch.no_grad(), bfloat16():
        x, _ = pictures.batch(MEASURED, rng)
        z = vae.encode(x).latent_dist.mode().float()
        y = vae.decode(z).sample.float()
    psnr = -10 * math.log10(((x - y) ** 2).mean().item() / 4)
    log(f"vae: PSNR {psnr:.1f} dB, latent deviation {z.std().item():.3f}")
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    return vae
