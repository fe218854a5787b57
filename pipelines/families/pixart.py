"""PixArt alpha and Sigma: a transformer with cross-attention to T5, whose output has a learned variance beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.attention import cross_attention_layers, masked_cross_attention
from pipelines.errors import ModelError
from pipelines.families.defaults import cleanable, encode_defaults, facts_of_whole
from pipelines.model import DiffusionModel, Embeddings, Part, TextFacts


class PixArtSigma(DiffusionModel):
    """PixArt-Sigma: captions of up to 300 tokens."""

    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline")
    parts: ClassVar[dict[str, Part]] = {
        "transformer": Part("diffusers", ("PixArtTransformer2DModel", "Transformer2DModel")),
        "vae": Part("diffusers", ("AutoencoderKL",)),
        "text_encoder": Part("transformers", ("T5EncoderModel",)),
        "tokenizer": Part("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    }
    pipeline_class = "PixArtSigmaPipeline"
    denoiser_part = "transformer"
    encoded = (
        *("prompt_embeds", "prompt_attention_mask"),
        *("negative_prompt_embeds", "negative_prompt_attention_mask"),
    )
    fixed_tokens = 0
    no_mask = "T5's end token is not known to summarise the prompt"
    guidance_default = 4.5
    attention = staticmethod(masked_cross_attention)

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        config, given = configs["transformer"], configs["text_encoder"]["d_model"]
        if config.get("caption_channels") != given:
            raise ModelError(
                f"transformer/ takes text embeddings of width {config.get('caption_channels')}, but text_encoder gives "
                f"{given}"
            )
        if config.get("out_channels") not in (config["in_channels"], 2 * config["in_channels"]):
            raise ModelError(f"the transformer gives {config.get('out_channels')} channels for {config['in_channels']}")

    @classmethod
    def layers(cls, denoiser: nn.Module) -> list[str]:
        return cross_attention_layers(denoiser)

    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        plain = {**encode_defaults(self.pipeline), "device": self.device, "do_classifier_free_guidance": False}
        plain |= options
        given = cleanable(captions, plain["clean_caption"])
        found = dict(zip(self.encoded, self.pipeline.encode_prompt(given, **plain), strict=True))
        cleaned = self.pipeline._text_preprocessing(given, clean_caption=plain["clean_caption"])
        facts = facts_of_whole(self.facts(cleaned, found), given, captions)
        return {name: value for name, value in found.items() if value is not None}, facts

    def facts(self, cleaned: list[str], encoded: Mapping[str, Tensor]) -> TextFacts:
        """T5 ends a prompt with its end token, the last one that is not padding."""
        mask = encoded["prompt_attention_mask"][:: max(1, len(encoded["prompt_attention_mask"]) // len(cleaned))]
        lengths = torch.tensor([len(row) for row in self.pipeline.tokenizer(cleaned, truncation=False)["input_ids"]])
        return TextFacts(mask.sum(1).long().cpu() - 1, lengths - 1, lengths > mask.shape[1])

    def conditions(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"encoder_attention_mask": encoded["prompt_attention_mask"]}

    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        return self.denoiser(
            latents,
            encoder_hidden_states=prompts.hidden,
            timestep=timestep.expand(len(latents)),
            added_cond_kwargs=self.size_conditions(len(latents), prompts.hidden.dtype),
            return_dict=False,
            **prompts.conditions,
        )[0]

    def size_conditions(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The picture's size as conditions: none."""
        return {"resolution": None, "aspect_ratio": None}


class PixArtAlpha(PixArtSigma):
    """PixArt-alpha: captions of up to 120 tokens; at 1024 pixels told the picture's size, as its pipeline does."""

    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline",)
    pipeline_class = "PixArtAlphaPipeline"

    def size_conditions(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
        if self.denoiser.config.sample_size != 128:
            return super().size_conditions(batch, dtype)
        size = torch.tensor([self.image_size], dtype=dtype, device=self.device).expand(batch, -1)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
