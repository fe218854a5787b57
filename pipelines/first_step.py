"""First-step scores of many prompts: one evaluation of the denoiser a prompt and noise."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import formulas
from pipelines.attention import MaskSource, check_token
from pipelines.batching import AdaptiveBatches, BatchSize, one_behind
from pipelines.detectors import FirstStep, scores
from pipelines.model import DiffusionModel, Embeddings
from pipelines.null_maps import NullMaps
from pipelines.schedules import NoiseLevel
from pipelines.text_stream import TextStream

Array = NDArray[np.float32]
EXPECTED = 3  # calls whose prompts are encoded before they are made; more and the oldest is forgotten


@dataclass(frozen=True)
class FirstStepScores:
    """Scores of N prompts, means over the K shared noises; float32, NaN where the model gave one.

    Attributes:
        scores: every detector the model and the settings have the facts for (`pipelines.detectors`): name -> [N].
        ld_std: standard deviation of `ld` over the noises (0 for one noise), [N]; None where there is no `ld`.
        mask: the attention mask `ld` was computed with, [N, H, W]; None where there is no `ld`.
        energy_mask: the mask of `ld_energy`, [N, H, W].
        num_tokens: [N], int64. truncated: [N], bool.
    """

    scores: dict[str, Array]
    ld_std: Array | None
    mask: Array | None
    energy_mask: Array
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]


class FirstStepScorer:
    """Scores prompts at the first sampling step.

    All prompts share the initial noises, so the unconditional output is computed once a noise and kept; a prompt then
    costs one evaluation a noise (MemBench, gen_utils.py, shares noise and unconditional prediction in the same way).
    Scores are differences of noise predictions, or of velocities where the first level has no signal (`unit`).
    A device never waits for what the processor does: prompts are tokenized and encoded ahead of the batch that needs
    them, in a thread, and the results of a batch are copied while the next one is computed.

    Args:
        model: a loaded model.
        mask_source: layers and token of the mask of `ld`; its step is `first`, or `none`. A model without a published
            mask, and no layers named, has no `ld`.
        num_noises: K. seed: of the noise bank.
        steps: sampling steps; the first of their levels is scored (t = 981 for 50 steps of Stable Diffusion 1).
        guidance_scale: enters `webster`, and models that are told it.
        batch_size: latents in one call of the denoiser, or `auto`; halved for good when memory runs out.
        extra_evaluation: also compute `cosine_low` and `anisotropy`, at one more evaluation a prompt and noise.
        first_noise: leave out the noises of the bank before this one.
        null_maps: of the noises that are used; without them there is no `excess`.

    Raises:
        ValueError: a mask of another step (that of the final one takes a trajectory), or layers or a token the model
            has not.
    """

    def __init__(
        self,
        model: DiffusionModel,
        mask_source: MaskSource | None = None,
        num_noises: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: BatchSize = 32,
        extra_evaluation: bool = False,
        first_noise: int = 0,
        null_maps: NullMaps | None = None,
    ) -> None:
        self.model = model
        self.mask_source = mask_source or MaskSource()
        if self.mask_source.step not in ("first", "none"):
            raise ValueError(f"a mask of step {self.mask_source.step} is no attention of the first step")
        self.layers = model.check_layers(self.mask_source.layers)
        if self.layers:
            check_token(self.mask_source.token, model.fixed_tokens)
        self.guidance_scale, self.extra_evaluation = guidance_scale, extra_evaluation
        self.batches = AdaptiveBatches(batch_size)
        self.texts_at_once = self.batches.batch_size
        self.ahead = 0 if model.device.type == "cpu" else 2  # batches of prompts; a processor has no time to spare
        self._thread = ThreadPoolExecutor(1, "encode")  # started with the first batch that is encoded ahead
        self._expected: collections.deque[TextStream] = collections.deque(maxlen=EXPECTED)
        self.evaluations = 0  # of the denoiser so far: one latent through it once
        self.noises = model.noise_bank(num_noises, seed)[first_noise:].to(model.device, model.dtype)
        self.null_maps = None if null_maps is None else null_maps.to(model.device)
        self.unit, levels = model.unit(steps), model.levels(steps)
        self.level, self.low_level = levels[0], levels[max(-3, -steps)]
        self.uncond = self._unconditional(self.level)  # raw outputs, [K, C, H, W]
        self.uncond_low = self._unconditional(self.low_level) if extra_evaluation else None

    @torch.inference_mode()
    def _unconditional(self, level: NoiseLevel) -> Tensor:
        empty = self.model.encode_empty()
        return torch.cat([self._predict(self.noises[k : k + 1], level, empty) for k in range(len(self.noises))])

    def _predict(self, latents: Tensor, level: NoiseLevel, embeddings: Embeddings) -> Tensor:
        self.evaluations += len(latents)
        return self.model.predict(latents, level, embeddings, self.guidance_scale)

    @torch.inference_mode()
    def __call__(self, captions: list[str], on_batch: Callable[[int], None] | None = None) -> FirstStepScores:
        """Score captions.

        Args:
            captions: N non-empty strings.
            on_batch: called with the number of captions finished by each batch; may raise to stop.

        Returns:
            the scores, in the captions' order.
        """
        with contextlib.closing(self._texts(captions)) as texts:
            found = self._in_batches(captions, lambda part: self._score(texts, part), on_batch)
            num_tokens, truncated = texts.facts()
        means = {name: (value.mean(1) if value.shape[1] > 1 else value[:, 0]).numpy() for name, value in found.items()}
        mask, energy_mask = means.pop("mask", None), means.pop("energy_mask")
        return FirstStepScores(
            scores=means,
            ld_std=found["ld"].std(1, correction=0).numpy() if "ld" in found else None,
            num_tokens=num_tokens.numpy(),
            truncated=truncated.numpy(),
            mask=mask,
            energy_mask=energy_mask,
        )

    @torch.inference_mode()
    def differences(self, captions: list[str], on_batch: Callable[[int], None] | None = None) -> Tensor:
        """Noise differences of the first step alone, [N, K, C, H, W], float32 on the CPU; arguments as of a call."""
        count = len(self.noises)

        def difference(part: slice) -> dict[str, Tensor]:
            pair = torch.arange(part.start, part.stop)
            prompt, noise = pair // count, pair % count
            latents = self.noises[noise]
            output = self._predict(latents, self.level, texts.take(prompt))
            return {"difference": self._facts(output, self.uncond[noise], latents, self.level).difference}

        with contextlib.closing(self._texts(captions)) as texts:
            return self._in_batches(captions, difference, on_batch)["difference"]

    def expect(self, captions: list[str]) -> None:
        """Begin to encode captions that a later call will be given, from any thread: it starts at once then."""
        if self.ahead and captions:
            self._expected.append(self._encoded(captions))

    def _texts(self, captions: list[str]) -> TextStream:
        for texts in list(self._expected):
            if texts.captions == captions:
                self._expected.remove(texts)
                return texts
        return self._encoded(captions)

    def _encoded(self, captions: list[str]) -> TextStream:
        at_once = max(self.texts_at_once, self.batches.batch_size)  # as many as a batch that has grown
        return TextStream(self.model, captions, at_once, self.ahead, self._thread)

    def _in_batches(
        self,
        captions: list[str],
        compute: Callable[[slice], dict[str, Tensor]],
        on_batch: Callable[[int], None] | None,
    ) -> dict[str, Tensor]:
        """What `compute` gives for pairs (prompt, noise), prompt * K + noise: name -> [N, K, ...], on the CPU."""
        count, seen = len(self.noises), 0
        batches = self.batches.run(len(captions) * count, lambda part: HostCopy(compute(part)), HostCopy.wait)
        whole: dict[str, Tensor] = {}
        for part, copy in one_behind(batches):
            for name, values in copy.wait().items():
                if name not in whole:
                    whole[name] = values.new_empty(len(captions) * count, *values.shape[1:])
                whole[name][part] = values
            if on_batch:
                on_batch(part.stop // count - seen)
            seen = part.stop // count
        return {name: values.unflatten(0, (len(captions), count)) for name, values in whole.items()}

    def _score(self, texts: TextStream, part: slice) -> dict[str, Tensor]:
        """One call of the denoiser over pairs (prompt, noise), numbered prompt * K + noise."""
        model, pair = self.model, torch.arange(part.start, part.stop)
        prompt, noise = pair // len(self.noises), pair % len(self.noises)
        prompts, latents = texts.take(prompt), self.noises[noise]
        with model.capture(self.layers, prompts, self.mask_source.token, model.entropy_layers) as attention:
            output = self._predict(latents, self.level, prompts)
        low = None
        if self.uncond_low is not None:
            output_low = self._predict(latents, self.low_level, prompts)
            low = self._facts(output_low, self.uncond_low[noise], latents, self.low_level)
        first = replace(
            self._facts(output, self.uncond[noise], latents, self.level),
            mask=attention.mask(model.latent_shape[1:]) if self.layers else None,
            token_attention=token_attention(attention.token_means),
            low=low,
            null=None if self.null_maps is None else self.null_maps.take(noise),
        )
        found = {**scores(first), "energy_mask": formulas.energy_mask(first.energy)}
        if first.mask is not None:
            found["mask"] = first.mask
        return found

    def _facts(self, output: Tensor, uncond: Tensor, latents: Tensor, level: NoiseLevel) -> FirstStep:
        model = self.model
        return FirstStep.of(
            model.difference(output, uncond, level, self.unit),
            model.in_unit(uncond, latents, level, self.unit),
            guidance_scale=self.guidance_scale,
            sigma_max=model.schedule.sigma_max if self.unit == "epsilon" else None,
            anisotropy_weights=formulas.anisotropy_weights(model.text_width),
        )


class HostCopy:
    """Tensors of B rows each on their way to the CPU as float32: one copy, made when the device gets there."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        flat = torch.cat([value.float().reshape(len(value), -1) for value in found.values()], 1)
        self._shapes = {name: value.shape for name, value in found.items()}
        self._done: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(flat.device))
        else:
            self._flat = flat.cpu()

    def wait(self) -> dict[str, Tensor]:
        """The tensors, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        parts = self._flat.split([math.prod(shape[1:]) for shape in self._shapes.values()], 1)
        return {name: part.reshape(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def token_attention(token_means: dict[str, Tensor]) -> Tensor | None:
    """Mean attention over tokens of the one captured layer, [B, L]; None for models that do not have it."""
    return next(iter(token_means.values()), None)
