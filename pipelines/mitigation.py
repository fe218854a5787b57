"""Mitigation: a prompt's embedding is moved at the first step until the noise difference no longer points at a memory.

The loss is LD (Chen et al. 2025) or, as the baseline, the magnitude (Wen et al. 2024). What the official code does
otherwise (BE-PRSS, local_sd_pipeline.py): one norm over the images of a batch, where it is one per image here, as in
detection; and AdamW decays the start-of-text row too, which is no parameter here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines import formulas
from pipelines.attention import MaskSource
from pipelines.batching import AdaptiveBatches
from pipelines.model import DiffusionModel, Embeddings
from pipelines.trajectory import TrajectorySampler

Array = NDArray[np.float32]
LOSSES: tuple[str, ...] = ("ld", "magnitude")
HALF_SCALE = 1024.0  # of the loss in float16: gradients of single embedding entries fall below its smallest number
BACK_OFF, LEAST_SCALE = 16.0, 2.0**-10  # where gradients overflow, the scale is divided by the one, down to the other


@dataclass(frozen=True)
class Mitigation:
    """N prompts after mitigation, each with its own initial noise.

    Attributes:
        embeddings: N rows; those that were not moved are bit-identical to the ones given. Only the text embeddings are
            moved, never a pooled one.
        score: the trigger's score, [N] float32: the loss of the unmitigated prompt under the first step's own mask,
            or under the masks that were given.
        triggered: score > threshold, [N] bool.
        loss_history: loss before every update and after the last, [N, iterations + 1] float32; NaN after the stop and
            for prompts that were not triggered.
        iterations_used: updates applied, [N] int64.
    """

    embeddings: Embeddings
    score: Array
    triggered: NDArray[np.bool_]
    loss_history: Array
    iterations_used: NDArray[np.int64]

    @property
    def first_loss(self) -> Array:
        """Loss before mitigation, [N] float32, NaN where not triggered."""
        return self.loss_history[:, 0]

    @property
    def last_loss(self) -> Array:
        """Loss of the embedding that is returned, [N] float32, NaN where not triggered."""
        return self.loss_history[np.arange(len(self.loss_history)), self.iterations_used]

    @staticmethod
    def concatenate(parts: list[Mitigation]) -> Mitigation:
        """Mitigations of one Mitigator, one after the other."""
        return Mitigation(
            Embeddings.concatenate([part.embeddings for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.triggered for part in parts]),
            np.concatenate([part.loss_history for part in parts]),
            np.concatenate([part.iterations_used for part in parts]),
        )


class Mitigator:
    """Moves prompt embeddings with AdamW at the first sampling step until their loss is at most the target.

    Every row (prompt and noise) is optimised on its own: its loss is a norm over its own image, it stops by itself,
    and what it becomes does not depend on the rows beside it but for float rounding. Only text embeddings after the
    start-of-text token are parameters. The model's own attention runs forward and backward; its weights get no
    gradients.

    Args:
        model: a loaded model.
        loss: `ld` or `magnitude`.
        target: a row stops when its loss is at most this.
        threshold: a row is mitigated when its score is above this; None for all.
        mask_source: mask of `ld` where none are given. `first` and `energy` come from the unmitigated first step.
            `final` (the paper's) takes a whole unmitigated trajectory of each triggered row; its trigger is the score
            under the `first` mask, which is known before.
        learning_rate, iterations: of AdamW; 0.05 and 10 are Wen et al.'s.
        weight_decay: of AdamW; 0.01 is its default and what the official codes run with. It shrinks the embedding by
            learning_rate * weight_decay (0.05 %) an update.
        steps, guidance_scale: of the sampler; the first of its timesteps is the one optimised at (981 for 50 steps of
            Stable Diffusion 1). The guidance enters `final` masks alone.
        gradient_checkpointing: keep less of the denoiser's forward pass and compute it again: less memory, more time.
        batch_size: rows at a time; halved for good when memory runs out.

    Raises:
        ValueError: an unknown loss, a negative target or number of iterations, layers the model does not have, or no
            mask for `ld`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        loss: str = "ld",
        target: float = 1.0,
        threshold: float | None = None,
        mask_source: MaskSource | None = None,
        learning_rate: float = 0.05,
        iterations: int = 10,
        weight_decay: float = 0.01,
        steps: int = 50,
        guidance_scale: float = 7.5,
        gradient_checkpointing: bool = False,
        batch_size: int = 8,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
        if target < 0:
            raise ValueError(f"target {target} is negative: no loss gets there")
        if iterations < 0:
            raise ValueError(f"{iterations} iterations")
        self.model, self.kind, self.target, self.threshold = model, loss, target, threshold
        self.mask_source = mask_source or MaskSource()
        self.layers = model.check_layers(self.mask_source.layers)
        self.learning_rate, self.iterations, self.weight_decay = learning_rate, iterations, weight_decay
        self.steps, self.guidance_scale = steps, guidance_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.batches = AdaptiveBatches(batch_size)
        self.unit, self.level = model.unit(steps), model.levels(steps)[0]
        self.empty = model.encode_empty()
        self.first = model.fixed_tokens  # text positions from here on are parameters

    @torch.inference_mode(False)
    def __call__(
        self,
        prompts: list[str] | Embeddings,
        noises: Tensor,
        masks: Tensor | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Mitigation:
        """Mitigate prompts.

        Args:
            prompts: N captions or their embeddings; repeat a prompt for several noises.
            noises: initial latents x_T, [N, C, H, W], such as `sampler.noises[indices]`.
            masks: masks of `ld`, [N, H, W], for instance BE masks of trajectories already sampled; None to read them
                as `mask_source` says. A mask that is zero everywhere has no LD, and its row is left alone.
            on_batch: called with the number of rows finished by each batch; may raise to stop.

        Raises:
            ValueError: numbers of prompts, noises and masks differ, or no prompts.
        """
        if isinstance(prompts, list):
            prompts = self.model.encode(prompts)
        counts = {"noises": len(noises)} | ({} if masks is None else {"masks": len(masks)})
        for name, count in counts.items():
            if count != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {count} {name}")
        if not len(prompts):
            raise ValueError("no prompts to mitigate")
        parts = []
        run = self.batches.run(
            len(prompts),
            lambda part: self._mitigate(prompts.take(part), noises[part], None if masks is None else masks[part]),
        )
        for part, found in run:
            parts.append(found)
            if on_batch:
                on_batch(part.stop - part.start)
        return Mitigation.concatenate(parts)

    def loss(self, prompts: Embeddings, latents: Tensor, uncond: Tensor, masks: Tensor | None) -> Tensor:
        """The loss at the first step, differentiable in `prompts.hidden`; one evaluation a row.

        Args:
            prompts: B rows. latents: x_T, [B, C, H, W]. uncond: raw output for "", [B, C, H, W].
            masks: [B, H, W]; not used by `magnitude`.
        Returns:
            [B], float32.
        """
        return self._reduce(self._energy(prompts, latents, uncond), masks)

    def _mitigate(self, prompts: Embeddings, latents: Tensor, masks: Tensor | None) -> Mitigation:
        """One batch."""
        model = self.model
        prompts = prompts.detached()
        latents = latents.detach().to(model.device, model.dtype).clone()
        # 1. the unmitigated first step: score, trigger, mask
        with torch.no_grad():
            uncond = self._predict(latents, self.empty.expand(len(prompts)))
            score, masks, own = self._score(prompts, latents, uncond, masks)
        triggered = torch.ones_like(score, dtype=torch.bool) if self.threshold is None else score > self.threshold
        active = triggered.nonzero().flatten().tolist()
        if own and self.mask_source.step == "final" and active and self.iterations:
            masks = self._final_masks(prompts, latents, active, masks)
        # 2. optimise the triggered rows
        words, history, used = self._optimise(prompts, latents, uncond, masks, active)
        with torch.no_grad():
            for row, moved in words.items():
                if used[row]:
                    prompts.hidden[row, self.first :] = moved.to(prompts.hidden.dtype)
        return Mitigation(prompts, score.cpu().numpy(), triggered.cpu().numpy(), history.cpu().numpy(), used.numpy())

    def _optimise(
        self, prompts: Embeddings, latents: Tensor, uncond: Tensor, masks: Tensor | None, active: list[int]
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """AdamW on the rows `active`: embeddings after start-of-text by row, loss history, updates applied."""
        history = torch.full((len(prompts), self.iterations + 1), float("nan"), device=latents.device)
        used = torch.zeros(len(prompts), dtype=torch.int64)
        # a parameter a row: rows that stopped have no gradient, so AdamW leaves them and their state alone;
        # in float32, because AdamW's epsilon is zero in float16
        words = {row: prompts.hidden[row, self.first :].float().clone().requires_grad_() for row in active}
        if not words:
            return words, history, used
        optimiser = torch.optim.AdamW(words.values(), self.learning_rate, weight_decay=self.weight_decay)
        scales = dict.fromkeys(active, HALF_SCALE if latents.dtype == torch.float16 else 1.0)

        def losses(rows: list[int]) -> Tensor:
            at = torch.tensor(rows)
            moved = torch.stack([words[row] for row in rows]).to(prompts.hidden.dtype)
            part = prompts.take(at)
            part = replace(part, hidden=torch.cat([part.hidden[:, : self.first], moved], 1))
            return self.loss(part, latents[at], uncond[at], None if masks is None else masks[at])

        with _only_embeddings(self.model.denoiser, self.gradient_checkpointing):
            for iteration in range(self.iterations + 1):
                with torch.set_grad_enabled(iteration < self.iterations):
                    loss = losses(active)
                history[active, iteration] = loss.detach()
                going = (loss.detach() > self.target).nonzero().flatten().tolist()  # a NaN stops as well
                active = [active[place] for place in going]
                if not active or iteration == self.iterations:
                    break
                optimiser.zero_grad()
                waiting, scaled = active, loss[going]
                while waiting:  # rows whose gradients overflow are tried again at a smaller scale
                    weights = torch.tensor([scales[row] for row in waiting], device=scaled.device)
                    gradients = torch.autograd.grad((scaled * weights).sum(), [words[row] for row in waiting])
                    again = []
                    for row, gradient in zip(waiting, gradients, strict=True):
                        if gradient.isfinite().all():
                            words[row].grad = gradient / scales[row]
                        elif scales[row] > LEAST_SCALE:
                            scales[row] /= BACK_OFF
                            again.append(row)
                    with torch.enable_grad():
                        waiting, scaled = again, losses(again) if again else scaled
                active = [row for row in active if words[row].grad is not None]  # else it keeps its last embedding
                if not active:
                    break
                optimiser.step()
                used[active] += 1
        return words, history, used

    def _predict(self, latents: Tensor, prompts: Embeddings) -> Tensor:
        return self.model.predict(latents, self.level, prompts, self.guidance_scale)

    def _energy(self, prompts: Embeddings, latents: Tensor, uncond: Tensor) -> Tensor:
        output = self._predict(latents, prompts)
        return formulas.energy_map(self.model.difference(output, uncond, self.level, self.unit))

    def _reduce(self, energy: Tensor, masks: Tensor | None) -> Tensor:
        if self.kind == "magnitude":
            return formulas.magnitude(energy)
        if masks is None:
            raise ValueError("the loss ld needs masks")
        return formulas.ld(energy, masks.to(energy.device))

    def _score(
        self, prompts: Embeddings, latents: Tensor, uncond: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor | None, bool]:
        """The unmitigated loss, the masks it was taken under, and whether they were read here."""
        if self.kind == "magnitude" or masks is not None:
            energy = self._energy(prompts, latents, uncond)
            return self._reduce(energy, masks), masks, False
        layers = () if self.mask_source.step == "energy" else self.layers
        if not layers and self.mask_source.step != "energy":
            raise ValueError(f"no attention mask for the loss ld: {self.model.no_mask}; the mask energy is there")
        with self.model.capture(layers, prompts, self.mask_source.token) as attention:
            energy = self._energy(prompts, latents, uncond)
        masks = attention.mask(self.model.latent_shape[1:]) if layers else formulas.energy_mask(energy)
        return self._reduce(energy, masks), masks, True

    def _final_masks(self, prompts: Embeddings, latents: Tensor, active: list[int], masks: Tensor | None) -> Tensor:
        """`masks` with the rows `active` replaced by the BE masks of their unmitigated trajectories."""
        assert masks is not None
        source = MaskSource("final", self.mask_source.token, tuple(self.layers))
        sampler = TrajectorySampler(self.model, source, 1, 0, self.steps, self.guidance_scale)
        rows = torch.tensor(active)
        found = sampler.sample(prompts.take(rows), latents[rows], decode=False)["be_mask"]
        masks = masks.clone()
        masks[rows] = found.clone()
        return masks


@contextmanager
def _only_embeddings(denoiser: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """No gradients for the denoiser's weights (they would cost memory), checkpointing as asked; both restored after."""
    net: Any = denoiser
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    switched = gradient_checkpointing and not net.is_gradient_checkpointing
    for parameter in trainable:
        parameter.requires_grad_(False)
    if switched:
        net.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switched:
            net.disable_gradient_checkpointing()
        for parameter in trainable:
            parameter.requires_grad_(True)
