"""Stable Diffusion 1 and 2: a U-Net with cross-attention to one CLIP; and what is distilled from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.attention import cross_attention_layers, entropy_layer, paper_layers
from pipelines.errors import ModelError
from pipelines.families.defaults import encode_defaults
from pipelines.model import DiffusionModel, Embeddings, Part, TextFacts, check_text_width, encoded_ids, text_facts

CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type")
"""Of a U-Net's configuration: conditions beside time and text, each None where there is none."""


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1 and 2 by any class over the same weights; LCMs and others with a guidance embedding."""

    pipelines: ClassVar[tuple[str, ...]] = (
        *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        *("StableDiffusionInpaintPipelineLegacy", "StableDiffusionPipelineSafe", "StableDiffusionPAGPipeline"),
        *("StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline", "StableDiffusionPanoramaPipeline"),
        *("StableDiffusionSAGPipeline", "StableDiffusionAttendAndExcitePipeline", "LatentConsistencyModelPipeline"),
        "LatentConsistencyModelImg2ImgPipeline",
    )
    pipeline_class = "StableDiffusionPipeline"
    pipeline_options: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    parts: ClassVar[dict[str, Part]] = {
        "unet": Part("diffusers", ("UNet2DConditionModel",)),
        "vae": Part("diffusers", ("AutoencoderKL",)),
        "text_encoder": Part("transformers", ("CLIPTextModel",)),
        "tokenizer": Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    }
    denoiser_part = "unet"
    sides_together = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guided_by_embedding = self.denoiser.config.time_cond_proj_dim is not None  # LCM, Meng et al. 2023

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        check_unet(configs["unet"])
        check_text_width(configs, "unet", int(configs["unet"]["cross_attention_dim"]), "text_encoder")

    @classmethod
    def layers(cls, denoiser: nn.Module) -> list[str]:
        return cross_attention_layers(denoiser)

    @classmethod
    def default_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        return paper_layers(denoiser)

    @classmethod
    def token_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        layer = entropy_layer(denoiser)
        return () if layer is None else (layer,)

    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        plain = {**encode_defaults(self.pipeline), "device": self.device, "do_classifier_free_guidance": False}
        with encoded_ids(self.pipeline.text_encoder) as ids:
            encoded = self.pipeline.encode_prompt(captions, **{**plain, **options})
        return dict(zip(self.encoded, encoded, strict=False)), self.facts(captions, ids[0])

    def facts(self, captions: list[str], ids: Tensor) -> TextFacts:
        """Of the ids its first CLIP was given; captions with textual inversions as the pipeline spells them out."""
        tokenizer = self.pipeline.tokenizer
        return text_facts(ids, self.pipeline.maybe_convert_prompt(captions, tokenizer), tokenizer, special=2)

    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        conditions = {**self.added(prompts, len(latents)), **self._guidance(len(latents), guidance_scale)}
        return self.denoiser(latents, timestep, encoder_hidden_states=prompts.hidden, return_dict=False, **conditions)[
            0
        ]

    def added(self, prompts: Embeddings, batch: int) -> dict[str, Any]:
        """Further conditions of the U-Net."""
        return {}

    def guide(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        return cond if self.guided_by_embedding else super().guide(uncond, cond, guidance_scale)

    def _guidance(self, batch: int, guidance_scale: float | None) -> dict[str, Tensor]:
        if not self.guided_by_embedding:
            return {}
        scale = self.guidance_default if guidance_scale is None else guidance_scale
        weights = torch.full((batch,), scale - 1.0)
        width = self.denoiser.config.time_cond_proj_dim
        embedded = self.pipeline.get_guidance_scale_embedding(weights, embedding_dim=width)
        return {"timestep_cond": embedded.to(self.device, self.dtype)}


def check_unet(config: Mapping[str, Any], added: str | None = None) -> None:
    """Refuse a U-Net with conditions its family does not supply, or without the cross-attention masks are read from.

    Args:
        config: with the class's defaults. added: the `addition_embed_type` the family supplies.
    Raises:
        ModelError: naming the field.
    """
    if config["in_channels"] != config["out_channels"]:
        raise ModelError(
            f"the U-Net takes {config['in_channels']} channels and gives {config['out_channels']}: inpainting and "
            "other conditions on a picture are not supported"
        )
    for field in CONDITIONS:
        if config[field] not in (None, added if field == "addition_embed_type" else None):
            raise ModelError(
                f"unet/config.json sets {field} to {config[field]!r}: a condition beside time and text, which a "
                "prompt alone does not give"
            )
    if added is not None and config["addition_embed_type"] != added:
        raise ModelError(f"unet/config.json does not set addition_embed_type to {added!r}, as this family's do")
    if not any("CrossAttn" in str(block) for block in config["down_block_types"]):
        raise ModelError("the U-Net has no cross-attention in its down path, so no BE mask")
