"""Sana: a transformer with linear attention and cross-attention to Gemma, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.attention import cross_attention_layers, masked_cross_attention
from pipelines.errors import ModelError
from pipelines.families.defaults import cleanable, encode_defaults, facts_of_whole
from pipelines.model import DiffusionModel, Embeddings, Part, TextFacts, check_text_width, encoded_ids
from pipelines.schedules import FlowMatching, FlowSigmas


class Sana(DiffusionModel):
    """Sana 1 and 1.5. The prompt is encoded behind the instruction its pipeline's call has, "" without it."""

    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline", "SanaPAGPipeline")
    pipeline_class = "SanaPipeline"
    parts: ClassVar[dict[str, Part]] = {
        "transformer": Part("diffusers", ("SanaTransformer2DModel",)),
        "vae": Part("diffusers", ("AutoencoderDC",)),
        "text_encoder": Part("transformers", ("Gemma2Model",)),
        "tokenizer": Part("transformers", ("GemmaTokenizer", "GemmaTokenizerFast")),
    }
    denoiser_part = "transformer"
    schedules = (FlowSigmas, FlowMatching)
    encoded = (
        *("prompt_embeds", "prompt_attention_mask"),
        *("negative_prompt_embeds", "negative_prompt_attention_mask"),
    )
    ends_prompts = False
    no_mask = "Gemma is given no end token"
    guidance_default = 4.5
    attention = staticmethod(masked_cross_attention)

    @classmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        config = configs["transformer"]
        if config["guidance_embeds"]:
            raise ModelError("transformer/config.json sets guidance_embeds: a distilled Sana, which is not read")
        if config["out_channels"] not in (None, config["in_channels"], 2 * config["in_channels"]):
            raise ModelError(f"the transformer gives {config['out_channels']} channels for {config['in_channels']}")
        check_text_width(configs, "transformer", int(config["caption_channels"]), "text_encoder")

    @classmethod
    def layers(cls, denoiser: nn.Module) -> list[str]:
        return cross_attention_layers(denoiser)

    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        plain = {**encode_defaults(self.pipeline), "device": self.device, "do_classifier_free_guidance": False}
        plain |= options
        given = cleanable(captions, plain["clean_caption"])
        with encoded_ids(self.pipeline.text_encoder) as ids:
            encoded = self.pipeline.encode_prompt(given, **plain)
        found = dict(zip(self.encoded, encoded, strict=True))
        copies = len(found["prompt_attention_mask"]) // len(captions)
        places = found["prompt_attention_mask"][::copies].sum(1).long().cpu() - 1
        cleaned = self.pipeline._text_preprocessing(given, clean_caption=plain["clean_caption"])
        facts = self.facts(cleaned, ids[0], places, plain["complex_human_instruction"])
        facts = facts_of_whole(facts, given, captions)
        return {name: value for name, value in found.items() if value is not None}, facts

    def facts(self, cleaned: list[str], ids: Tensor, places: Tensor, instruction: list[str] | None) -> TextFacts:
        """Gemma has a start token and no end: its place is the last real token's. The instruction is not counted."""
        before = "\n".join(instruction or [])
        rows = self.pipeline.tokenizer([before + each for each in cleaned], truncation=False)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows])
        counted = lengths - len(self.pipeline.tokenizer(before)["input_ids"])
        return TextFacts(places, counted.clamp(min=0), lengths > ids.shape[1])

    @torch.inference_mode()
    def encode_empty(self) -> Embeddings:
        encoded, facts = self.embed([""], complex_human_instruction=None)
        return Embeddings(encoded["prompt_embeds"], self.conditions(encoded), *facts)

    def conditions(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"encoder_attention_mask": encoded["prompt_attention_mask"]}

    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        return self.denoiser(
            latents,
            encoder_hidden_states=prompts.hidden,
            timestep=timestep.expand(len(latents)) * self.denoiser.config.timestep_scale,
            return_dict=False,
            **prompts.conditions,
        )[0]
