"""Full DDIM sampling in one pass: images, BE masks, energy maps, and every score window without a second run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import formulas
from pipelines.attention import MaskSource, capture_attention, entropy_layer, paper_layers
from pipelines.batching import AdaptiveBatches
from pipelines.detectors import FirstStep, scores
from pipelines.first_step import token_attention
from pipelines.loading import DiffusionModel, Embeddings

Array = NDArray[np.float32]
WINDOW = 10  # "first 10 steps" of the paper


@dataclass(frozen=True)
class Trajectories:
    """N sampled trajectories; float32 unless said.

    Attributes:
        images: [N, h, w, 3], uint8, or None when not decoded.
        be_mask: EOS attention of the final step (BE mask), [N, H, W]. first_mask: the same of the first step.
        energy_mask: smoothed energy map of the first step. score_map: E_T / sigma_T^2 of the last step.
        magnitude_t, ld_t: scores of every step, [N, steps]; ld_t under the BE mask.
        ld_score: first-step LD under `score_map`, [N].
        first: every detector of the first step (`pipelines.detectors`), `ld` under `first_mask`: name -> [N].
    """

    images: NDArray[np.uint8] | None
    be_mask: Array
    first_mask: Array
    energy_mask: Array
    score_map: Array
    magnitude_t: Array
    ld_t: Array
    ld_score: Array
    first: dict[str, Array]

    def __len__(self) -> int:
        return len(self.be_mask)

    def row(self, row: int) -> Trajectories:
        """One trajectory by itself."""
        one = slice(row, row + 1)
        parts: dict[str, Any] = {
            name: None if values is None else values[one] for name, values in vars(self).items() if name != "first"
        }
        return Trajectories(**parts, first={name: values[one] for name, values in self.first.items()})

    @staticmethod
    def of(columns: Mapping[str, NDArray[Any]]) -> Trajectories:
        """From the columns of `TrajectorySampler.sample`, as arrays; the detectors' are called `first.NAME`."""
        plain: dict[str, Any] = {name: values for name, values in columns.items() if not name.startswith("first.")}
        first = {name.removeprefix("first."): columns[name] for name in columns if name not in plain}
        return Trajectories(**{"images": None, **plain}, first=first)

    def windows(self) -> dict[str, Array]:
        """Means over the first step, the first 10 and all steps: `magnitude`, `ld_first`, `magnitude_10`, ..., [N]."""
        return {
            "magnitude": self.magnitude_t[:, 0],
            "magnitude_10": self.magnitude_t[:, :WINDOW].mean(1),
            "magnitude_all": self.magnitude_t.mean(1),
            "ld_first": self.ld_t[:, 0],
            "ld_10": self.ld_t[:, :WINDOW].mean(1),
            "ld_all": self.ld_t.mean(1),
        }


class TrajectorySampler:
    """Samples prompts from given noises with DDIM (eta 0) and classifier-free guidance.

    The official code runs the trajectory twice, once for the mask and once for LD (BE-PRSS, local_sd_pipeline.py).
    LD needs only the energy map of each step, so one pass is enough: ld_t = sqrt(sum m^2 E_t) / mean(m). Attention is
    captured at the first and the last step; the steps between run the model's own attention alone.

    Args:
        model: a loaded model.
        mask_source: layers and token of the masks; its step plays no part here, all of them are returned.
        num_noises, seed: the noise bank, as in FirstStepScorer.
        steps, guidance_scale: of the sampler.
        batch_size: trajectories at a time (a U-Net call sees twice as many latents).

    Raises:
        ValueError: layers the U-Net does not have.
    """

    def __init__(
        self,
        model: DiffusionModel,
        mask_source: MaskSource | None = None,
        num_noises: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 16,
    ) -> None:
        self.model, self.steps, self.guidance_scale = model, steps, guidance_scale
        source = mask_source or MaskSource()
        self.token, self.layers = source.token, source.layers or paper_layers(model.unet)
        self.entropy_layer = entropy_layer(model.unet)
        self.batches = AdaptiveBatches(batch_size)
        self.noises = model.noise_bank(num_noises, seed).to(model.device, model.dtype)
        self.empty = model.encode_empty()

    @torch.inference_mode()
    def __call__(
        self,
        captions: list[str],
        noise_indices: list[int] | None = None,
        decode: bool = True,
        on_batch: Callable[[int], None] | None = None,
    ) -> Trajectories:
        """Sample one trajectory per caption.

        Args:
            captions: N prompts; repeat a prompt for several noises.
            noise_indices: which noise of the bank each starts from, [N]; all 0 by default.
            decode: also decode the images.
            on_batch: called with the number of trajectories finished by each batch; may raise to stop.
        """
        indices = torch.tensor(noise_indices if noise_indices is not None else [0] * len(captions))
        columns: dict[str, list[NDArray[Any]]] = {}

        def sample(part: slice) -> dict[str, Tensor]:
            return self.sample(self.model.encode(captions[part]), self.noises[indices[part]], decode)

        for part, found in self.batches.run(len(captions), sample):
            for name, value in found.items():
                columns.setdefault(name, []).append(value.cpu().numpy())
            if on_batch:
                on_batch(part.stop - part.start)
        return Trajectories.of({name: np.concatenate(values) for name, values in columns.items()})

    @torch.inference_mode()
    def sample(
        self, prompts: Embeddings, latents: Tensor, decode: bool = True, every_step: bool = False
    ) -> dict[str, Tensor]:
        """One batch: embeddings of B prompts and their initial latents [B, C, H, W]; columns for `Trajectories.of`.

        `every_step` captures attention at every step and adds `masks_t`, [B, steps, H, W].
        """
        model, batch = self.model, len(latents)
        timesteps = model.timesteps(self.steps)
        both = Embeddings.concatenate([self.empty.expand(batch), prompts])
        energies: list[Tensor] = []
        masks: dict[int, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for step, timestep in enumerate(timesteps):
            last = len(timesteps) - 1
            # 1. noise predictions of "" and of the prompt
            if every_step or step in (0, last):
                entropy = (self.entropy_layer,) if self.entropy_layer and step == 0 else ()
                size = model.latent_shape[1:]
                with capture_attention(model.unet, self.layers, both.eos_positions, size, self.token, entropy) as seen:
                    output = model.predict(torch.cat([latents, latents]), timestep, both)
                masks[step] = seen.mask(size)[batch:]
            else:
                output = model.predict(torch.cat([latents, latents]), timestep, both)
            output_uncond, output_cond = output.chunk(2)
            uncond = model.to_noise(output_uncond, latents, timestep)
            difference = model.to_noise(output_cond, latents, timestep).float() - uncond.float()
            # 2. what the scores need of this step
            energies.append(formulas.energy_map(difference))
            if step == 0:
                means = {name: value[batch:] for name, value in seen.token_means.items()}
                first = FirstStep.of(
                    difference,
                    uncond,
                    masks[0],
                    token_attention(means),
                    guidance_scale=self.guidance_scale,
                    sigma_max=model.sigma_max,
                )
                columns = {f"first.{name}": value for name, value in scores(first).items()}
            # 3. guidance and the step to x_{t-1}
            guided = output_uncond + self.guidance_scale * (output_cond - output_uncond)
            latents = model.scheduler.step(guided, timestep, latents, eta=0.0, return_dict=False)[0]
        energy = torch.stack(energies, 1)  # [B, steps, H, W]
        score_map = formulas.score_difference_map(energy[:, -1], model.alpha_bar(timesteps[-1]))
        columns |= {
            "be_mask": masks[last],
            "first_mask": masks[0],
            "energy_mask": formulas.energy_mask(energy[:, 0]),
            "score_map": score_map,
            "magnitude_t": formulas.magnitude(energy),
            "ld_t": formulas.ld(energy, masks[last][:, None]),
            "ld_score": formulas.ld(energy[:, 0], score_map),
        }
        if every_step:
            columns["masks_t"] = torch.stack([masks[step] for step in sorted(masks)], 1)
        if decode:
            images = model.decode(latents).permute(0, 2, 3, 1)
            columns["images"] = (images * 255).round().to(torch.uint8)
        return columns
