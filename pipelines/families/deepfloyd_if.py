"""DeepFloyd IF, stage I: a U-Net of pixels, 64 x 64, conditioned by T5; its output has a learned variance beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pipelines.errors import ModelError
from pipelines.families.defaults import cleanable, encode_defaults, facts_of_whole
from pipelines.families.stable_diffusion import CONDITIONS
from pipelines.model import DiffusionModel, Embeddings, Part, TextFacts, check_text_width, encoded_ids, text_facts
from pipelines.schedules import Schedule, VariancePreserving

SUPPLIED = {"encoder_hid_dim_type": "text_proj", "addition_embed_type": "text"}
"""Conditions of its U-Net that are made of the text embeddings."""


class DeepFloydIF(DiffusionModel):
    """Stage I alone: the later stages enlarge its picture. What is sampled are pixels, with dynamic thresholding."""

    pipelines: ClassVar[tuple[str, ...]] = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
    pipeline_class = "IFPipeline"
    pipeline_options: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    parts: ClassVar[dict[str, Part]] = {
        "unet": Part("diffusers", ("UNet2DConditionModel",)),
        "text_encoder": Part("transformers", ("T5EncoderModel",)),
        "tokenizer": Part("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    }
    denoiser_part = "unet"
    fixed_tokens = 0
    no_mask = "pictures and text share one softmax, and T5's end token is not known to summarise the prompt"
    guidance_default = 7.0

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        config = configs["unet"]
        if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
            raise ModelError(
                f"the U-Net takes {config['in_channels']} channels and gives {config['out_channels']}: it is no stage I"
            )
        for field in CONDITIONS:
            if config[field] not in (None, SUPPLIED.get(field)):
                raise ModelError(
                    f"unet/config.json sets {field} to {config[field]!r}: a condition beside time and text, which a "
                    "prompt alone does not give"
                )
        check_text_width(configs, "unet", int(config["encoder_hid_dim"] or 0), "text_encoder")

    @classmethod
    def open_schedule(cls, scheduler: Any, denoiser: Any) -> Schedule:
        return VariancePreserving(scheduler, thresholding=True)

    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        plain = {**encode_defaults(self.pipeline), "device": self.device, "do_classifier_free_guidance": False}
        plain |= options
        given = cleanable(captions, plain["clean_caption"])
        with encoded_ids(self.pipeline.text_encoder) as ids:
            encoded = self.pipeline.encode_prompt(given, **plain)
        found = dict(zip(self.encoded, encoded, strict=True))
        cleaned = self.pipeline._text_preprocessing(given, clean_caption=plain["clean_caption"])
        facts = facts_of_whole(text_facts(ids[0], cleaned, self.pipeline.tokenizer, special=1), given, captions)
        return {name: value for name, value in found.items() if value is not None}, facts

    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        return self.denoiser(latents, timestep, encoder_hidden_states=prompts.hidden, return_dict=False)[0]

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Pixels are what was sampled."""
        return latents.float()
