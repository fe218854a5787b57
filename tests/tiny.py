"""Random models of every family's shape, small enough for a test; saved as the folders users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from audit import testbed
from tests.tiny_transformers import save_if, save_pixart, save_sana, save_sd3

SIZE = 8  # latents; pictures are twice as wide
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


FAMILIES = (
    *("sd1", "sd2", "sdxl", "zero_snr", "distilled", "playground"),
    *("pixart", "pixart_alpha", "sd3", "sd3_clip", "sana", "if"),
)
"""Every kind `save_model` makes."""


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a model and return its folder.

    Args:
        kind: `sd1` (epsilon), `sd2` (v-prediction, padded with id 0), `sdxl`; `zero_snr` (sd2's with zero terminal
            SNR), `distilled` (sd1's with a guidance embedding), `playground` (sdxl's with EDM noise and latent means);
            `pixart`, `pixart_alpha`, `sd3`, `sd3_clip` (without T5), `sana`, `if` (stage I).
    """
    if kind.startswith("pixart"):
        return save_pixart(folder, alpha=kind == "pixart_alpha")
    if kind.startswith("sd3"):
        return save_sd3(folder, t5=kind == "sd3")
    if kind in ("sana", "if"):
        return save_sana(folder) if kind == "sana" else save_if(folder)
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer")
    means: dict[str, Any] = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.6, 5.2]}
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        **({**means, "scaling_factor": 0.5} if kind == "playground" else {}),
    )
    shared: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer}
    if kind in ("sdxl", "playground"):
        second = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer", pad_token="!")
        StableDiffusionXLPipeline(
            unet=_unet(64, 5, addition_embed_type="text_time", addition_time_embed_dim=8, projection=32 + 6 * 8),
            text_encoder=CLIPTextModel(_text_config(tokenizer, 32)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 32)),
            tokenizer_2=second,
            scheduler=EDMDPMSolverMultistepScheduler()
            if kind == "playground"
            else DDIMScheduler(**SCHEDULE, clip_sample=False),
            **shared,
        ).save_pretrained(folder)
        return folder
    second_generation = kind in ("sd2", "zero_snr")
    if second_generation:
        shared["tokenizer"] = tokenizer = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer", pad_token="!")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if kind == "zero_snr" else {}
    scheduler = (
        DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction", **zero)
        if second_generation
        else PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    )
    StableDiffusionPipeline(
        unet=_unet(
            32,
            [2, 4] if second_generation else 2,
            upcast_attention=second_generation,
            time_cond_proj_dim=16 if kind == "distilled" else None,
        ),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 32)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **shared,
    ).save_pretrained(folder)
    return folder


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(context: int, heads: Any, projection: int | None = None, **options: Any) -> UNet2DConditionModel:
    xl = projection is not None
    net = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(20, 40) if xl else (16, 32),
        norm_num_groups=4,
        cross_attention_dim=context,
        attention_head_dim=heads,
        transformer_layers_per_block=(1, 2) if xl else 1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("CrossAttnUpBlock2D",) * 2,
        use_linear_projection=xl,
        projection_class_embeddings_input_dim=projection,
        **options,
    )
    with torch.no_grad():  # sharper attention and a stronger prompt than random initialisation gives
        for name, parameter in net.named_parameters():
            if "attn2.to_" in name and parameter.ndim == 2:
                parameter.mul_(4)
    return net
