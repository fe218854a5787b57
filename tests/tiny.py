"""Random models of Stable Diffusion's three shapes, small enough for a test; saved as the folders users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from audit import testbed

SIZE = 16  # latents; pictures are twice as wide
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a model of kind `sd1` (epsilon), `sd2` (v-prediction, padded with id 0) or `sdxl` and return its folder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer")
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIZE,
    )
    shared: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer}
    if kind == "sdxl":
        second = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer", pad_token="!")
        StableDiffusionXLPipeline(
            unet=_unet(64, 5, addition_embed_type="text_time", addition_time_embed_dim=8, projection=32 + 6 * 8),
            text_encoder=CLIPTextModel(_text_config(tokenizer, 32)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 32)),
            tokenizer_2=second,
            scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False),
            **shared,
        ).save_pretrained(folder)
        return folder
    if kind == "sd2":
        shared["tokenizer"] = tokenizer = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer", pad_token="!")
    scheduler = (
        DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")
        if kind == "sd2"
        else PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    )
    StableDiffusionPipeline(
        unet=_unet(32, [2, 4] if kind == "sd2" else 2, upcast_attention=kind == "sd2"),
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
