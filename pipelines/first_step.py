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
from pipelines.detectors import FirstStep, scores
from pipelines.loading import DiffusionModel, Embeddings

Array = NDArray[np.float32]


@dataclass(frozen=True)
class FirstStepScores:
    """Scores of N prompts, means over the K shared noises; float32, NaN where the model gave one.

    Attributes:
        scores: every detector the model and the settings have the facts for (`pipelines.detectors`): name -> [N].
        ld_std: standard deviation of `ld` over the noises (0 for one noise), [N]; None where there is no `ld`.
        mask: the attention mask `ld` was computed with, [N, H, W]; None where there is no `ld`.
        energy_mask: the mask of `ld_energy`, [N, H, W].
        energy: the first-step energy map, [N, H, W].
        num_tokens: [N], int64. truncated: [N], bool.
    """

    scores: dict[str, Array]
    ld_std: Array | None
    mask: Array | None
    energy_mask: Array
    energy: Array
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]


class FirstStepScorer:
    """Scores prompts at the first sampling step.

    All prompts share the initial noises, so eps(x_T, e_0) is computed once a noise and kept; a prompt then costs one
    U-Net evaluation a noise (MemBench, gen_utils.py, shares noise and unconditional prediction in the same way).

    Args:
        model: a loaded model.
        mask_source: layers and token of the mask of `ld`; its step is `first`.
        num_noises: K. seed: of the noise bank.
        steps: sampling steps; the first of their timesteps is scored (981 for 50 steps of Stable Diffusion 1).
        guidance_scale: enters `webster` alone.
        batch_size: latents in one U-Net call; halved for good when memory runs out.
        extra_evaluation: also compute `cosine_low` and `anisotropy`, at one more evaluation a prompt and noise.

    Raises:
        ValueError: a mask of another step (that of the final one takes a trajectory), or layers the U-Net has not.
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
        if self.mask_source.step != "first":
            raise ValueError(f"a mask of step {self.mask_source.step} is no attention of the first step")
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
        maps = {name: means.pop(name, None) for name in ("mask", "energy_mask", "energy")}
        return FirstStepScores(
            scores=means,
            ld_std=flat["ld"].std(1, correction=0).numpy() if "ld" in flat else None,
            num_tokens=embeddings.num_tokens.numpy(),
            truncated=embeddings.truncated.numpy(),
            **maps,
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
        layers = (self.entropy_layer,) if self.entropy_layer else ()
        grid = self.model.latent_shape[1:]
        with capture_attention(
            self.model.unet, self.layers, prompts.eos_positions, grid, self.mask_source.token, layers
        ) as attention:
            conditional = self._noise(latents, self.timestep, prompts)
        low = None
        if self.uncond_low is not None:
            uncond_low = self.uncond_low[noise]
            low = FirstStep.of(
                self._noise(latents, self.low_timestep, prompts).float() - uncond_low.float(), uncond_low
            )
        first = FirstStep.of(
            conditional.float() - uncond.float(),
            uncond,
            attention.mask(grid),
            token_attention(attention.token_means),
            low,
            self.guidance_scale,
            self.model.sigma_max,
            formulas.anisotropy_weights(self.model.unet.config.cross_attention_dim),
        )
        found = {**scores(first), "energy": first.energy, "energy_mask": formulas.energy_mask(first.energy)}
        if first.mask is not None:
            found["mask"] = first.mask
        return {name: value.float().cpu() for name, value in found.items()}


def token_attention(token_means: dict[str, Tensor]) -> Tensor | None:
    """Mean attention over tokens of the one captured layer, [B, L]; None for U-Nets that do not have it."""
    return next(iter(token_means.values()), None)
