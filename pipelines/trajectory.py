"""Deterministic sampling in one pass: images, BE masks, energy maps, and every score window without a second run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import formulas
from pipelines.attention import MaskSource
from pipelines.batching import AdaptiveBatches, BatchSize
from pipelines.detectors import FirstStep, scores
from pipelines.first_step import token_attention
from pipelines.model import DiffusionModel, Embeddings
from pipelines.null_maps import NullMaps

Array = NDArray[np.float32]
WINDOW = 10  # "first 10 steps" of the paper


@dataclass(frozen=True)
class Trajectories:
    """N sampled trajectories; float32 unless said.

    Attributes:
        images: [N, h, w, 3], uint8, or None when not decoded.
        energy_mask: smoothed energy map of the first step, [N, H, W]. score_map: E_T / sigma_T^2 of the last step.
        magnitude_t: scores of every step, [N, steps]. ld_score: first-step LD under `score_map`, [N].
        num_tokens, truncated: of the caption, [N].
        first: every detector of the first step (`pipelines.detectors`), `ld` under `first_mask`: name -> [N].
        be_mask: EOS attention of the final step (BE mask), [N, H, W]. first_mask: the same of the first step.
        ld_t: LD of every step under the BE mask, [N, steps]. These three are None for a model without a mask.
    """

    images: NDArray[np.uint8] | None
    energy_mask: Array
    score_map: Array
    magnitude_t: Array
    ld_score: Array
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    first: dict[str, Array]
    be_mask: Array | None = None
    first_mask: Array | None = None
    ld_t: Array | None = None

    def __len__(self) -> int:
        return len(self.energy_mask)

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
        """Means over the first step, the first 10 and all steps: `magnitude`, `ld_first`, `magnitude_10`, ..., [N].

        Those of `ld` are not there for a model without a mask.
        """
        windows = {
            "magnitude": self.magnitude_t[:, 0],
            "magnitude_10": self.magnitude_t[:, :WINDOW].mean(1),
            "magnitude_all": self.magnitude_t.mean(1),
        }
        if self.ld_t is not None:
            windows |= {
                "ld_first": self.ld_t[:, 0],
                "ld_10": self.ld_t[:, :WINDOW].mean(1),
                "ld_all": self.ld_t.mean(1),
            }
        return windows


class TrajectorySampler:
    """Samples prompts from given noises without further randomness, with classifier-free guidance.

    The official code runs the trajectory twice, once for the mask and once for LD (BE-PRSS, local_sd_pipeline.py).
    LD needs only the energy map of each step, so one pass is enough: ld_t = sqrt(sum m^2 E_t) / mean(m). Attention is
    captured at the first and the last step; the steps between run the model's own attention alone.

    Args:
        model: a loaded model.
        mask_source: layers and token of the masks; its step plays no part here, all of them are returned.
        num_noises, seed: the noise bank, as in FirstStepScorer.
        steps, guidance_scale: of the sampler.
        batch_size: trajectories at a time (a call of the denoiser sees twice as many latents).
        first_noise: leave out the noises of the bank before this one.
        null_maps: of the noises that are used; without them there is no `excess`.

    Raises:
        ValueError: layers the model does not have.
    """

    def __init__(
        self,
        model: DiffusionModel,
        mask_source: MaskSource | None = None,
        num_noises: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: BatchSize = 16,
        first_noise: int = 0,
        null_maps: NullMaps | None = None,
    ) -> None:
        self.model, self.steps, self.guidance_scale = model, steps, guidance_scale
        source = mask_source or MaskSource()
        self.token, self.layers = source.token, model.check_layers(source.layers)
        self.batches = AdaptiveBatches(batch_size)
        self.noises = model.noise_bank(num_noises, seed)[first_noise:].to(model.device, model.dtype)
        self.null_maps = None if null_maps is None else null_maps.to(model.device)
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
            noise_indices: which of the noises each starts from, [N]; all 0 by default.
            decode: also decode the images.
            on_batch: called with the number of trajectories finished by each batch; may raise to stop.
        """
        indices = torch.tensor(noise_indices if noise_indices is not None else [0] * len(captions))
        columns: dict[str, list[NDArray[Any]]] = {}

        def sample(part: slice) -> dict[str, Tensor]:
            null = None if self.null_maps is None else self.null_maps.take(indices[part])
            return self.sample(self.model.encode(captions[part]), self.noises[indices[part]], decode, null=null)

        for part, found in self.batches.run(len(captions), sample):
            for name, value in found.items():
                columns.setdefault(name, []).append(value.cpu().numpy())
            if on_batch:
                on_batch(part.stop - part.start)
        return Trajectories.of({name: np.concatenate(values) for name, values in columns.items()})

    @torch.inference_mode()
    def sample(
        self,
        prompts: Embeddings,
        latents: Tensor,
        decode: bool = True,
        every_step: bool = False,
        null: NullMaps | None = None,
    ) -> dict[str, Tensor]:
        """One batch: embeddings of B prompts and their initial latents [B, C, H, W]; columns for `Trajectories.of`.

        `every_step` captures attention at every step and adds `masks_t`, [B, steps, H, W], where there is a mask.
        `null`: null maps of the rows' noises.
        """
        model, batch, grid = self.model, len(latents), self.model.latent_shape[1:]
        unit, levels = model.unit(self.steps), model.levels(self.steps)
        both = Embeddings.concatenate([self.empty.expand(batch), prompts])
        energies: list[Tensor] = []
        masks: dict[int, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for step, level in enumerate(levels):
            captured = every_step or step in (0, len(levels) - 1)
            layers, token_layers = self.layers if captured else (), model.entropy_layers if step == 0 else ()
            # 1. outputs for "" and for the prompt
            with model.capture(layers, both, self.token, token_layers) as seen:
                output = model.predict(torch.cat([latents, latents]), level, both, self.guidance_scale)
            uncond, cond = output.chunk(2)
            if layers:
                masks[step] = seen.mask(grid)[batch:]
            # 2. what the scores need of this step
            difference = model.difference(cond, uncond, level, unit)
            energies.append(formulas.energy_map(difference))
            if step == 0:
                first = FirstStep.of(
                    difference,
                    model.in_unit(uncond, latents, level, unit),
                    masks.get(0),
                    token_attention({name: value[batch:] for name, value in seen.token_means.items()}),
                    guidance_scale=self.guidance_scale,
                    sigma_max=model.schedule.sigma_max if unit == "epsilon" else None,
                    null=null,
                )
                columns = {f"first.{name}": value for name, value in scores(first).items()}
            # 3. guidance and the step to x_{t-1}
            latents = model.step(model.guide(uncond, cond, self.guidance_scale), level, latents)
        energy = torch.stack(energies, 1)  # [B, steps, H, W]
        # of noise predictions: d_eps = a d_v
        to_noise = levels[-1].signal ** 2 if unit == "velocity" else 1.0
        score_map = formulas.score_difference_map(energy[:, -1] * to_noise, levels[-1].noise)
        columns |= {
            "energy_mask": formulas.energy_mask(energy[:, 0]),
            "score_map": score_map,
            "magnitude_t": formulas.magnitude(energy),
            "ld_score": formulas.ld(energy[:, 0], score_map),
            "num_tokens": prompts.num_tokens,
            "truncated": prompts.truncated,
        }
        if self.layers:
            be_mask = masks[len(levels) - 1]
            columns |= {"be_mask": be_mask, "first_mask": masks[0]}
            columns["ld_t"] = formulas.ld(energy, be_mask[:, None])
        if every_step and masks:
            columns["masks_t"] = torch.stack([masks[step] for step in sorted(masks)], 1)
        if decode:
            images = model.decode(latents).permute(0, 2, 3, 1)
            columns["images"] = (images * 255).round().to(torch.uint8)
        return columns
