"""Stable Diffusion XL: two CLIPs, a pooled embedding and the picture's size as conditions; also with EDM noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.errors import ModelError
from pipelines.families.stable_diffusion import StableDiffusion, check_unet
from pipelines.model import Embeddings, Part, check_text_width
from pipelines.schedules import Edm, VariancePreserving


class StableDiffusionXL(StableDiffusion):
    """SDXL, its fine-tunes and turbo versions, Playground v2 and v2.5 (EDM noise, latent means)."""

    pipelines: ClassVar[tuple[str, ...]] = (
        *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        *("StableDiffusionXLPAGPipeline", "StableDiffusionXLPAGImg2ImgPipeline"),
        "StableDiffusionXLPAGInpaintPipeline",
    )
    pipeline_class = "StableDiffusionXLPipeline"
    pipeline_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    parts: ClassVar[dict[str, Part]] = {
        **StableDiffusion.parts,
        "text_encoder_2": Part("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": StableDiffusion.parts["tokenizer"],
    }
    schedules = (VariancePreserving, Edm)
    encoded = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    guidance_default = 5.0
    sides_together = False

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        if index.get("requires_aesthetics_score"):
            raise ModelError(
                "it is SDXL's refiner (requires_aesthetics_score), which starts from another model's picture"
            )
        unet = configs["unet"]
        check_unet(unet, "text_time")
        width = int(unet["cross_attention_dim"])
        check_text_width(configs, "unet", width, "text_encoder", "text_encoder_2")
        pooled = int(configs["text_encoder_2"]["projection_dim"])
        given, taken = pooled + 6 * int(unet["addition_time_embed_dim"]), unet["projection_class_embeddings_input_dim"]
        if given != taken:
            raise ModelError(
                f"unet/ takes {taken} numbers of pooled text and sizes, but text_encoder_2 and addition_time_embed_dim "
                f"give {given}"
            )

    def conditions(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"text_embeds": encoded["pooled_prompt_embeds"]}

    @torch.inference_mode()
    def encode_empty(self) -> Embeddings:
        """The empty prompt; zeros where the configuration says so, which every published SDXL does."""
        empty = self.encode([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        pooled = torch.zeros_like(empty.conditions["text_embeds"])
        return replace(empty, hidden=torch.zeros_like(empty.hidden), conditions={"text_embeds": pooled})

    def added(self, prompts: Embeddings, batch: int) -> dict[str, Any]:
        height, width = self.image_size
        size = [[height, width, 0, 0, height, width]]  # original size, crop, target size
        ids = torch.tensor(size, device=self.device, dtype=prompts.hidden.dtype).expand(batch, -1)
        return {"added_cond_kwargs": {**prompts.conditions, "time_ids": ids}}

    def decode_raw(self, latents: Tensor) -> Tensor:
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # this VAE overflows in float16
        return super().decode_raw(latents)
