"""A loaded text-to-image diffusion model: everything that scorer, sampler, mitigation and capture ask of one.

A family (`pipelines/families/`) says how its prompts are encoded, how its denoiser is called and where attention can be
read; its schedule (`pipelines/schedules.py`) says what the noise levels and units are. Nothing else names a family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.attention import AttentionCapture, capture_attention, check_token, cross_attention
from pipelines.batching import AdaptiveBatches
from pipelines.errors import ModelError, NotFinite
from pipelines.schedules import NoiseLevel, Schedule, Unit, VariancePreserving, schedule_of

DECODE_AT_ONCE = 4  # pictures the VAE decodes together: its activations are far larger than the denoiser's
LONGEST = 1 << 16  # characters of a caption that are tokenized: far more than any text encoder takes


class TextFacts(NamedTuple):
    """Of B prompts, from the ids that were encoded.

    eos_positions: index of the first end token on the text axis (the last position when truncated), [B] int64; of the
        last real token where a family's prompts have no end.
    num_tokens: tokens of the whole caption without start and end, [B] int64. truncated: part of it was not seen, [B].
    """

    eos_positions: Tensor
    num_tokens: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class Embeddings:
    """B prompts as the denoiser takes them.

    Attributes:
        hidden: text embeddings, [B, L, D]: what mitigation moves.
        conditions: what else the family gives its denoiser for a prompt, each [B, ...]; the names are the family's.
        eos_positions, num_tokens, truncated: as in TextFacts.
    """

    hidden: Tensor
    conditions: dict[str, Tensor]
    eos_positions: Tensor
    num_tokens: Tensor
    truncated: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @staticmethod
    def concatenate(parts: list[Embeddings]) -> Embeddings:
        """Embeddings of one model, one after the other."""
        return Embeddings(
            torch.cat([part.hidden for part in parts]),
            {name: torch.cat([part.conditions[name] for part in parts]) for name in parts[0].conditions},
            torch.cat([part.eos_positions for part in parts]),
            torch.cat([part.num_tokens for part in parts]),
            torch.cat([part.truncated for part in parts]),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Embeddings:
        """The same change made to every tensor's rows."""
        return Embeddings(
            change(self.hidden),
            {name: change(value) for name, value in self.conditions.items()},
            change(self.eos_positions),
            change(self.num_tokens),
            change(self.truncated),
        )

    def take(self, rows: Tensor | slice) -> Embeddings:
        """The embeddings of some rows."""
        return self.map(lambda value: value[rows])

    def expand(self, batch: int) -> Embeddings:
        """One row repeated `batch` times without copying."""
        return self.map(lambda value: value.expand(batch, *value.shape[1:]))

    def detached(self) -> Embeddings:
        """Copies that may enter a graph: cloned outside of inference mode, and free of the graph they come from."""
        conditions = {name: value.detach().clone() for name, value in self.conditions.items()}
        return replace(self, hidden=self.hidden.detach().clone(), conditions=conditions)


@dataclass(frozen=True)
class Part:
    """One folder of a pipeline: classes it may be of, and whether the family runs without it.

    Attributes:
        library: diffusers or transformers. classes: names in it.
    """

    library: str
    classes: tuple[str, ...]
    optional: bool = False


class DiffusionModel(ABC):
    """A loaded model. One subclass a family, in a file of its own under `pipelines/families/`.

    Class attributes:
        pipelines: values of model_index.json's _class_name whose weights the family reads.
        pipeline_class: diffusers' text-to-image pipeline of them. pipeline_options: further arguments of it.
        parts: its folders; the files loaded from them are what a fingerprint hashes.
        denoiser_part: which part is the denoiser. schedules: kinds of noise schedule it is trained with.
        encoded: what the pipeline's encode_prompt returns, in order, by the names its call takes them back under.
        ends_prompts: whether the tokenizers close every prompt with their end token.
        fixed_tokens: text positions mitigation leaves alone: 1 for a start-of-text token.
        no_mask: why no attention mask is read by default; empty where one is.
        guidance_default: of the pipeline's call. sides_together: whether that takes height and width only together.
        guided_by_embedding: whether guidance is a condition of the denoiser, which then needs no second branch.

    Attributes:
        pipeline: diffusers' own, loaded. denoiser: its network. schedule: levels, steps and units.
        latent_shape: (C, H, W) of the latents. image_size: (h, w) of the pictures.
    """

    pipelines: ClassVar[tuple[str, ...]]
    pipeline_class: ClassVar[str]
    pipeline_options: ClassVar[dict[str, Any]] = {}
    parts: ClassVar[dict[str, Part]]
    denoiser_part: ClassVar[str]
    schedules: ClassVar[tuple[type[Schedule], ...]] = (VariancePreserving,)
    encoded: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    ends_prompts: ClassVar[bool] = True
    fixed_tokens: ClassVar[int] = 1
    no_mask: ClassVar[str] = ""
    guidance_default: ClassVar[float] = 7.5
    sides_together: ClassVar[bool] = False
    guided_by_embedding: bool = False
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype, name: str = "") -> None:
        self.pipeline, self.device, self.dtype, self.name = pipeline, device, dtype, name
        self.denoiser: Any = getattr(pipeline, self.denoiser_part)
        self.vae: Any = getattr(pipeline, "vae", None)
        self.latent_shape = self.latent_shape_of(self.denoiser.config)
        self.set_size(self.latent_shape[1:])
        self.schedule = self.open_schedule(pipeline.scheduler, self.denoiser.config)
        self.mask_layers = self.default_layers(self.denoiser)
        self.entropy_layers = self.token_layers(self.denoiser)

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that enter cross-attention; 0 where its configuration says none."""
        width = self.denoiser.config.get("cross_attention_dim")
        return width if isinstance(width, int) else 0

    def again(self, kind: type[DiffusionModel]) -> DiffusionModel:
        """The same weights as another class (a subclass that counts calls, for instance)."""
        return kind(self.pipeline, self.device, self.dtype, self.name)

    # -- what a family says ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check(cls, configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> None:
        """Refuse a folder by its configurations (class defaults filled in), before weights are read.

        Raises:
            ModelError: naming the fact of the folder that is in the way.
        """

    @classmethod
    def latent_shape_of(cls, config: Any) -> tuple[int, int, int]:
        """(C, H, W) of the latents from the denoiser's configuration."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)

    @classmethod
    def open_schedule(cls, scheduler: Any, denoiser: Any) -> Schedule:
        """The schedule of a diffusers scheduler and the denoiser's configuration."""
        return schedule_of(scheduler, cls.schedules)

    @classmethod
    def layers(cls, denoiser: nn.Module) -> list[str]:
        """Attention modules a mask can be read from, in the order the denoiser runs them."""
        return []

    @classmethod
    def default_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Those the mask of `ld` is read from unless told; empty where there is no published mask."""
        return ()

    @classmethod
    def token_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """The layer of `attention_entropy`, or none."""
        return ()

    attention = staticmethod(cross_attention)
    """From the inputs of one of `layers`, the attention of image positions to text: [B, heads, pixels, L], float32."""

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, prompts: Embeddings, guidance_scale: float | None) -> Tensor:
        """One call of the denoiser: its raw output, whatever channels it has."""

    @abstractmethod
    def embed(self, captions: list[str], **options: Any) -> tuple[dict[str, Tensor], TextFacts]:
        """The pipeline's own encode_prompt: what it returns, by `encoded`, and facts of the ids it gave the encoder."""

    def conditions(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`Embeddings.conditions` of the prompt from what `embed` returns."""
        return {}

    def set_size(self, size: tuple[int, int]) -> None:
        """Tell the model the (H, W) of its latents, where they are not the usual ones."""
        self.latent_shape = (self.latent_shape[0], *size)
        scale = getattr(self.pipeline, "vae_scale_factor", 1)  # pixels have none
        self.image_size = (size[0] * scale, size[1] * scale)

    # -- what every family has ---------------------------------------------------------------------------------------

    def unit(self, steps: int) -> Unit:
        """What the scores of a sampling of so many steps are differences of."""
        return self.schedule.unit(steps)

    def levels(self, steps: int) -> list[NoiseLevel]:
        """The sampler's noise levels, noisiest first."""
        return self.schedule.levels(steps, self.device)

    def noise_bank(self, num_noises: int, seed: int) -> Tensor:
        """The initial noises every prompt shares: one CPU generator, so that anyone can recompute a score.

        Returns:
            [K, C, H, W], float32, on the CPU, at the standard deviation of x_T.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        bank = torch.randn((num_noises, *self.latent_shape), generator=generator, dtype=torch.float32)
        return bank * self.schedule.noise_scale

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Embeddings:
        """Captions to embeddings, through the pipeline's own encode_prompt: cleaned where its call does and can.

        Of a caption longer than LONGEST the beginning is tokenized, which fills the text encoder all the same: 5 MB
        took a minute. Its `num_tokens` are those of that beginning.
        """
        encoded, facts = self.embed([caption[:LONGEST] for caption in captions])
        longer = torch.tensor([len(caption) > LONGEST for caption in captions])
        if bool((longer & ~facts.truncated.cpu()).any()):  # blanks without end, and perhaps text behind them
            encoded, facts = self.embed(captions)
        return Embeddings(encoded["prompt_embeds"], self.conditions(encoded), *facts)

    @torch.inference_mode()
    def encode_empty(self) -> Embeddings:
        """The unconditional row, as the pipeline's guidance has it: that of "" unless a family says otherwise."""
        return self.encode([""])

    def predict(
        self, latents: Tensor, level: NoiseLevel, prompts: Embeddings, guidance_scale: float | None = None
    ) -> Tensor:
        """One evaluation a latent: the raw output, [B, C, H, W], in the model's dtype; learned variances left out.

        Args:
            latents: x_t. level: of `levels`. prompts: B rows.
            guidance_scale: for distilled models, which take it as a condition; others do not notice.
        """
        scaled = self.schedule.scale_input(latents, level)
        return self.denoise(scaled, level.timestep, prompts, guidance_scale)[:, : self.latent_shape[0]]

    def difference(self, output: Tensor, uncond: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        """d: two raw outputs subtracted, then brought to `unit`, [B, C, H, W], float32."""
        difference = output.float() - uncond.float()
        factor = self.schedule.factor(level, unit)
        return difference if factor == 1 else difference * factor

    def in_unit(self, output: Tensor, latents: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        """One raw output in `unit`, [B, C, H, W]."""
        return self.schedule.in_unit(output, latents, level, unit)

    def guide(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022) of two raw outputs."""
        return uncond + guidance_scale * (cond - uncond)

    def step(self, output: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        """The deterministic step to the next level."""
        return self.schedule.step(output, level, latents)

    def capture(
        self, layers: tuple[str, ...], prompts: Embeddings, token: str = "eos", token_layers: tuple[str, ...] = ()
    ) -> AbstractContextManager[AttentionCapture]:
        """Capture attention in the block, as `capture_attention`. Raises ModelError as `check_token`."""
        if layers:
            check_token(token, self.fixed_tokens)
        grid = self.latent_shape[1:]
        known, reader = self.layers(self.denoiser), self.attention
        return capture_attention(self.denoiser, layers, prompts.eos_positions, grid, token, token_layers, known, reader)

    def check_layers(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The layers a mask is read from: those asked for, else the family's own.

        Raises:
            ValueError: a layer the model does not have.
        """
        known = self.layers(self.denoiser)
        for name in layers:
            if name not in known:
                raise ValueError(no_such_layer(name, known))
        return layers or self.mask_layers

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures, a few at a time: [B, 3, h, w], float32 in [0, 1].

        Raises:
            NotFinite: a picture that is not finite, in float32 too.
            RuntimeError: a single one does not fit in memory; no out-of-memory error, since a smaller batch of
                trajectories would not help.
        """
        batches = AdaptiveBatches(DECODE_AT_ONCE)
        try:
            parts = [found for _, found in batches.run(len(latents), lambda rows: self._decode_finite(latents[rows]))]
        except torch.OutOfMemoryError as error:
            raise RuntimeError("decoding a single picture does not fit in memory") from error
        return torch.cat(parts)

    def _decode_finite(self, latents: Tensor) -> Tensor:
        images = self.decode_raw(latents)
        bad = ~images.isfinite().flatten(1).all(1)
        if bad.any() and self.vae is not None and self.vae.dtype != torch.float32:
            kept = self.vae.dtype
            self.vae.to(torch.float32)  # exact there and back: the weights came from the smaller type
            try:
                images[bad] = self.decode_raw(latents[bad])
            finally:
                self.vae.to(kept)
            bad = ~images.isfinite().flatten(1).all(1)
        if bad.any():
            raise NotFinite("the decoded picture is not finite")
        return (images / 2 + 0.5).clamp(0, 1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The VAE's own pictures, [B, 3, h, w], float32, about [-1, 1]."""
        config = self.vae.config
        scaled = latents.to(self.vae.dtype)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(scaled) for values in (mean, std))
            scaled = scaled * std / config.scaling_factor + mean
        else:
            scaled = scaled / config.scaling_factor
            if getattr(config, "shift_factor", None) is not None:
                scaled = scaled + config.shift_factor
        return self.vae.decode(scaled, return_dict=False)[0].float()


def no_such_layer(name: str, known: list[str]) -> str:
    """What is said of a mask layer that is not there."""
    return f"{name}: the model has no such attention layer to read; it has {', '.join(known) or 'none'}"


def check_text_width(configs: Mapping[str, Mapping[str, Any]], part: str, width: int, *encoders: str) -> None:
    """Raise ModelError where a denoiser takes text embeddings of another width than its encoders give."""
    given = sum(int(configs[name].get("hidden_size") or configs[name].get("d_model") or 0) for name in encoders)
    if given != width:
        raise ModelError(f"{part}/ takes text embeddings of width {width}, but {' and '.join(encoders)} give {given}")


@contextmanager
def encoded_ids(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the token ids a text encoder is called with inside the block, each [B, L]."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).detach().cpu())

    handle = encoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def text_facts(ids: Tensor, captions: list[str], tokenizer: Any, special: int) -> TextFacts:
    """Facts of prompts from the ids that were encoded.

    Args:
        ids: padded, [B, L]. captions: B, as the tokenizer was given them.
        tokenizer: that made the ids. special: tokens it adds to a caption.
    """
    lengths = torch.tensor([len(row) for row in tokenizer(captions, truncation=False)["input_ids"]])
    is_end = ids == tokenizer.eos_token_id
    last = torch.tensor(ids.shape[1] - 1)
    eos = torch.where(is_end.any(1), is_end.int().argmax(1), last)
    return TextFacts(eos, lengths - special, lengths > ids.shape[1])
