"""Random models of PixArt's, Stable Diffusion 3's, Sana's and DeepFloyd IF's shapes, made offline and saved."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
)
from transformers import T5TokenizerFast as T5Tokenizer

LETTERS = string.ascii_lowercase + string.digits
SIZE = 8  # latents; pictures are twice as wide
SEED = 0


def clip_tokenizer() -> CLIPTokenizer:
    """Character-level BPE without merges: every letter, and every letter at a word's end; padded with end-of-text."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram with one piece a letter; ids 0, 1, 2 are <pad>, </s>, <unk> as in T5; </s> is appended by itself."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{letter}", -3.0) for letter in LETTERS] + [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def clip_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def vae(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        **options,
    )


def save_pixart(folder: Path, alpha: bool = False) -> Path:
    """PixArt-Sigma, or PixArt-alpha."""
    torch.manual_seed(SEED)
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # the noise prediction and a learned variance
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "attn2.to_" in name and parameter.ndim == 2:
                parameter.mul_(4)
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    kind(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=t5_encoder(tokenizer, 32),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def save_sd3(folder: Path, t5: bool = True, **scheduler: Any) -> Path:
    """Stable Diffusion 3.5 (queries and keys are normalised), with T5 or without."""
    torch.manual_seed(SEED)
    clip, long = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    with torch.no_grad():  # training starts with no modulation, a random net with little: make the prompt matter
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_encoder(clip, 16),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip, 16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(long, 32) if t5 else None,
        tokenizer_3=long if t5 else None,
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer() -> GemmaTokenizer:
    """One piece a character; a start token, no end; what it does not know is <unk>."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *string.ascii_uppercase, *".,:->'\n"]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=[])


def save_sana(folder: Path) -> Path:
    """Sana 1.5 (queries and keys are normalised)."""
    torch.manual_seed(SEED)
    tokenizer = gemma_tokenizer()
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=SIZE,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                query_pre_attn_scalar=8,
            )
        ),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def save_if(folder: Path) -> Path:
    """DeepFloyd IF's first stage: a U-Net of pixels."""
    torch.manual_seed(SEED)
    tokenizer = t5_tokenizer()
    diffusers.IFPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=2 * SIZE,
            in_channels=3,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=8,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            time_embedding_act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        text_encoder=t5_encoder(tokenizer, 32),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
