"""Stable Diffusion 3 and 3.5: a transformer with joint attention, two CLIPs and T5, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.attention import joint_attention
from pipelines.errors import ModelError
from pipelines.families.defaults import encode_defaults
from pipelines.model import DiffusionModel, Embeddings, Part, TextFacts, encoded_ids, text_facts
from pipelines.schedules import FlowMatching, Schedule, schedule_of


class StableDiffusion3(DiffusionModel):
    """SD 3 and 3.5, with T5 or without it (its part of the text is zeros then, as the pipeline has it)."""

    pipelines: ClassVar[tuple[str, ...]] = (
        *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        *("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"),
    )
    pipeline_class = "StableDiffusion3Pipeline"
    parts: ClassVar[dict[str, Part]] = {
        "transformer": Part("diffusers", ("SD3Transformer2DModel",)),
        "vae": Part("diffusers", ("AutoencoderKL",)),
        "text_encoder": Part("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer": Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "text_encoder_2": Part("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": Part("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "text_encoder_3": Part("transformers", ("T5EncoderModel",), optional=True),
        "tokenizer_3": Part("transformers", ("T5Tokenizer", "T5TokenizerFast"), optional=True),
    }
    denoiser_part = "transformer"
    schedules = (FlowMatching,)
    encoded = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    no_mask = "no mask of joint attention is published"
    guidance_default = 7.0
    attention = staticmethod(joint_attention)

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        config = configs["transformer"]
        if config["in_channels"] != config["out_channels"]:
            raise ModelError(
                f"the transformer takes {config['in_channels']} channels and gives {config['out_channels']}: "
                "conditions on a picture are not supported"
            )
        pooled = sum(int(configs[name]["projection_dim"]) for name in ("text_encoder", "text_encoder_2"))
        if config["pooled_projection_dim"] != pooled:
            raise ModelError(
                f"transformer/ takes a pooled embedding of width {config['pooled_projection_dim']}, but text_encoder "
                f"and text_encoder_2 give {pooled}"
            )
        given = configs.get("text_encoder_3", {}).get("d_model")
        if given is not None and config["joint_attention_dim"] != given:
            raise ModelError(
                f"transformer/ takes text embeddings of width {config['joint_attention_dim']}, but text_encoder_3 "
                f"gives {given}"
            )

    @classmethod
    def open_schedule(cls, scheduler: Any, denoiser: Any) -> Schedule:
        """Dynamic shifting (SD 3.5 turbo's option) goes by the number of image tokens, as the pipeline computes it."""
        if not scheduler.config.get("use_dynamic_shifting"):
            return schedule_of(scheduler, cls.schedules)
        config, tokens = scheduler.config, (denoiser["sample_size"] // denoiser["patch_size"]) ** 2
        base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
        return schedule_of(scheduler, cls.schedules, mu=low + (high - low) * (tokens - base) / (most - base))

    @classmethod
    def layers(cls, denoiser: nn.Module) -> list[str]:
        blocks: Any = denoiser.transformer_blocks
        return [f"transformer_blocks.{number}.attn" for number in range(len(blocks))]

    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        plain = {**encode_defaults(self.pipeline), "device": self.device, "do_classifier_free_guidance": False}
        plain |= options
        with encoded_ids(self.pipeline.text_encoder) as ids:
            encoded = self.pipeline.encode_prompt(captions, **plain)
        found = dict(zip(self.encoded, encoded, strict=True))
        facts = self.facts(captions, ids[0], plain["max_sequence_length"])
        return {name: value for name, value in found.items() if value is not None}, facts

    def facts(self, captions: list[str], ids: Tensor, longest: int) -> TextFacts:
        """The end token is the first CLIP's; a caption is cut only where the longest encoder, T5, cuts it."""
        clip = text_facts(ids, captions, self.pipeline.tokenizer, special=2)
        if self.pipeline.text_encoder_3 is None:
            return clip
        rows = self.pipeline.tokenizer_3(captions, truncation=False)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows])
        return TextFacts(clip.eos_positions, lengths - 1, lengths > longest)

    def conditions(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_projections": encoded["pooled_prompt_embeds"]}

    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        return self.denoiser(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=prompts.hidden,
            return_dict=False,
            **prompts.conditions,
        )[0]
