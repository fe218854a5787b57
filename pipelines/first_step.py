"""First-step scores of many prompts: one U-Net evaluation a prompt and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import formulas
from pipelines.attention import MaskSource, capture_attention, entropy_layer, paper_layers
from pipelines.batching import AdaptiveBatches
from pipelines.loading import DiffusionModel, Embeddings

Array = NDArray[np.float32]


@dataclass(frozen=True)
class FirstStepScores:
    """Scores of N prompts, means over the K shared noises; float32, NaN where the model gave one.

    Attributes:
        magnitude, ld, ld_std, ld_energy, webster, attention_entropy, cosine: [N]. `ld_std` is the standard
            deviation of `ld` over the noises (0 for one noise).
        cosine_low, anisotropy: [N], or None without the extra evaluation.
        mask: [N, H, W], the mask `ld` was computed with.
        energy: [N, H, W], the first-step energy map.
        num_tokens: [N], int64. truncated: [N], bool.
    """

    magnitude: Array
    ld: Array
    ld_std: Array
    ld_energy: Array
    webster: Array
    attention_entropy: Array
    cosine: Array
    cosine_low: Array | None
    anisotropy: Array | None
    mask: Array
    energy: Array
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]


class FirstStepScorer:
    """Scores prompts at the first sampling step.

    All prompts share the initial noises, so eps(x_T, e_0) is computed once a noise and kept; a prompt then costs one
    U-Net evaluation a noise (MemBench, gen_utils.py, shares noise and unconditional prediction in the same way).

    Args:
        model: a loaded model.
        mask_source: where the mask of `ld` comes from; step `first` or `energy`.
        num_noises: K. seed: of the noise bank.
        steps: sampling steps; the first of their timesteps is scored (981 for 50 steps of Stable Diffusion 1).
        guidance_scale: enters `webster` alone.
        batch_size: latents in one U-Net call; halved for good when memory runs out.
        extra_evaluation: also compute `cosine_low` and `anisotropy`, at one more evaluation a prompt and noise.

    Raises:
        ValueError: a mask of the final step (that takes a trajectory), or layers the U-Net does not have.
    """

    def __init__(
        self,
        model: DiffusionModel,
        mask_source: MaskSource | None = None,
        num_noises: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 32,
        extra_evaluation: bool = False,
    ) -> None:
        self.model = model
        self.mask_source = mask_source or MaskSource()
        if self.mask_source.step == "final":
            raise ValueError("a mask of the final step takes a whole trajectory: use TrajectorySampler")
        self.layers = self.mask_source.layers or paper_layers(model.unet)
        self.entropy_layer = entropy_layer(model.unet)
        self.guidance_scale, self.extra_evaluation = guidance_scale, extra_evaluation
        self.batches = AdaptiveBatches(batch_size)
        self.evaluations = 0  # U-Net evaluations so far, one latent through the U-Net once
        self.noises = model.noise_bank(num_noises, seed).to(model.device, model.dtype)
        timesteps = model.timesteps(steps)
        self.timestep, self.low_timestep = timesteps[0], timesteps[max(-3, -steps)]
        self.uncond = self._unconditional(self.timestep)  # [K, C, H, W]
        self.uncond_low = self._unconditional(self.low_timestep) if extra_evaluation else None

    @torch.inference_mode()
    def _unconditional(self, timestep: Tensor) -> Tensor:
        empty = self.model.encode_empty()
        outputs = [self._noise(self.noises[k : k + 1], timestep, empty) for k in range(len(self.noises))]
        return torch.cat(outputs)

    def _noise(self, latents: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        self.evaluations += len(latents)
        return self.model.to_noise(self.model.predict(latents, timestep, embeddings), latents, timestep)

    @torch.inference_mode()
    def __call__(self, captions: list[str], on_batch: Callable[[int], None] | None = None) -> FirstStepScores:
        """Score captions.

        Args:
            captions: N non-empty strings.
            on_batch: called with the number of captions finished by each batch; may raise to stop.

        Returns:
            the scores, in the captions' order.
        """
        count = len(self.noises)
        embeddings = self._encode(captions)
        columns: dict[str, list[Tensor]] = {}
        seen = 0
        for part, found in self.batches.run(len(captions) * count, lambda part: self._score(embeddings, part)):
            for name, value in found.items():
                columns.setdefault(name, []).append(value)
            if on_batch:
                on_batch(part.stop // count - seen)
            seen = part.stop // count
        flat = {name: torch.cat(values).unflatten(0, (len(captions), count)) for name, values in columns.items()}
        means = {name: value.mean(1).numpy() for name, value in flat.items()}
        return FirstStepScores(
            ld_std=flat["ld"].std(1, correction=0).numpy(),
            num_tokens=embeddings.num_tokens.numpy(),
            truncated=embeddings.truncated.numpy(),
            **{"cosine_low": None, "anisotropy": None, **means},
        )

    def _encode(self, captions: list[str]) -> Embeddings:
        """Encode in the same batches; embeddings are kept on the device (118 kB a prompt for SD1 in float16)."""
        parts = [found for _, found in self.batches.run(len(captions), lambda part: self.model.encode(captions[part]))]
        return Embeddings.concatenate(parts)

    def _score(self, embeddings: Embeddings, part: slice) -> dict[str, Tensor]:
        """One U-Net call over pairs (prompt, noise), numbered prompt * K + noise."""
        pair = torch.arange(part.start, part.stop)
        prompt, noise = pair // len(self.noises), pair % len(self.noises)
        prompts, latents = embeddings.take(prompt), self.noises[noise]
        uncond = self.uncond[noise]
        with capture_attention(
            self.model.unet,
            () if self.mask_source.step == "energy" else self.layers,
            prompts.eos_positions,
            self.model.latent_shape[1:],
            self.mask_source.token,
            (self.entropy_layer,) if self.entropy_layer else (),
        ) as attention:
            conditional = self._noise(latents, self.timestep, prompts)
        scores = first_step_columns(
            conditional.float() - uncond.float(), uncond, self.guidance_scale, self.model.sigma_max
        )
        own = formulas.energy_mask(scores["energy"])
        scores["mask"] = own if self.mask_source.step == "energy" else attention.mask(self.model.latent_shape[1:])
        scores["ld"] = formulas.ld(scores["energy"], scores["mask"])
        scores["attention_entropy"] = token_entropy(attention.token_means, len(latents))
        if self.uncond_low is not None:
            low = self._noise(latents, self.low_timestep, prompts)
            cosine_low = formulas.cosine(self.uncond_low[noise], low.float() - self.uncond_low[noise].float())
            scores["cosine_low"] = cosine_low
            scores["anisotropy"] = formulas.anisotropy(scores["magnitude"], cosine_low)
        return {name: value.float().cpu() for name, value in scores.items()}


def first_step_columns(
    difference: Tensor, uncond: Tensor, guidance_scale: float, sigma_max: float
) -> dict[str, Tensor]:
    """What the noise difference of the first step gives without attention: energy, magnitude, ld_energy, ..."""
    energy = formulas.energy_map(difference)
    return {
        "energy": energy,
        "magnitude": formulas.magnitude(energy),
        "ld_energy": formulas.ld(energy, formulas.energy_mask(energy)),
        "webster": formulas.webster(uncond, difference, guidance_scale, sigma_max),
        "cosine": formulas.cosine(uncond, difference),
    }


def token_entropy(token_means: dict[str, Tensor], batch: int) -> Tensor:
    """Entropy column from the one captured layer; NaN for U-Nets that do not have it."""
    if not token_means:
        return torch.full((batch,), float("nan"))
    return formulas.attention_entropy(next(iter(token_means.values())))
