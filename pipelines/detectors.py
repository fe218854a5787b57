"""Every first-step score, one function each: what it is called, where it comes from, what it needs.

A detector is a function of a `FirstStep` with a value a row; a higher value is more suspicious. Its column in a run,
its line in the data dictionary, its place in `--by`, in `evaluate`, in SQL and in the report follow from the decorator:
nothing else names it. Importing this module loads no torch, so that commands which only list the scores stay quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pipelines  # formulas are reached through it when a detector runs: they load torch

if TYPE_CHECKING:
    from torch import Tensor

    import pipelines.formulas
    from pipelines.null_maps import NullMaps, Residual

Need = Literal["mask", "token_attention", "low", "sigma_max", "null", "residual"]


@dataclass(frozen=True)
class FirstStep:
    """What the first sampling step tells of B rows (a row is a prompt and a noise).

    Attributes:
        difference: noise difference d = eps(x_T, e_p) - eps(x_T, e_0), [B, C, H, W], float32; of velocities where the
            first level has no signal (flow matching, zero terminal SNR).
        uncond: unconditional prediction eps(x_T, e_0), or the velocity, [B, C, H, W].
        energy: d squared and summed over channels, [B, H, W], float32.
        mask: attention of the end-of-text token at this step, [B, H, W]; None where the model has none to read.
        token_attention: attention over tokens of Ren et al.'s layer, averaged over heads and pixels, [B, L]; or None.
        low: the same facts on the same pure noise at the third last timestep; None without the extra evaluation.
        guidance_scale: of classifier-free guidance.
        sigma_max: s / a of the schedule's noisiest level, sqrt((1 - abar) / abar); None where it is infinite.
        anisotropy_weights: of magnitude and `cosine_low`, by the family of the model.
        null: what is usual of other captions' energy maps under the row's noise, a row each; None outside of a run.
    """

    difference: Tensor
    uncond: Tensor
    energy: Tensor
    mask: Tensor | None = None
    token_attention: Tensor | None = None
    low: FirstStep | None = None
    guidance_scale: float = 7.5
    sigma_max: float | None = 1.0
    anisotropy_weights: tuple[float, float] = (1.0, 2.0)
    null: NullMaps | None = None

    @property
    def residual(self) -> Residual | None:
        """What other captions' differences have in common under the row's noise, and what is usual of the rest."""
        return None if self.null is None else self.null.residual

    @classmethod
    def of(
        cls,
        difference: Tensor,
        uncond: Tensor | None = None,
        mask: Tensor | None = None,
        token_attention: Tensor | None = None,
        low: FirstStep | None = None,
        guidance_scale: float = 7.5,
        sigma_max: float | None = 1.0,
        anisotropy_weights: tuple[float, float] = (1.0, 2.0),
        null: NullMaps | None = None,
    ) -> FirstStep:
        """From a noise difference [B, C, H, W]; its energy is computed here, `uncond` is zero where it is not given."""
        difference = difference.float()
        return cls(
            difference,
            difference.new_zeros(difference.shape) if uncond is None else uncond,
            pipelines.formulas.energy_map(difference),
            mask,
            token_attention,
            low,
            guidance_scale,
            sigma_max,
            anisotropy_weights,
            null,
        )


@dataclass(frozen=True)
class Detector:
    """A first-step score: the column `name`, what it is, who it is from, and its function.

    Attributes:
        needs: what must be there beside difference, unconditional prediction and energy; a run that has it not has
            nulls in this column.
    """

    name: str
    description: str
    source: str
    needs: tuple[Need, ...]
    function: Callable[[FirstStep], Tensor]

    @property
    def text(self) -> str:
        """One line for a data dictionary."""
        extra = "; null without --extra-evaluation" if "low" in self.needs else ""
        return f"{self.description} ({self.source}){extra}"


DETECTORS: dict[str, Detector] = {}
"""Every detector by name, in the order of their columns."""


def detector(
    description: str, source: str, needs: tuple[Need, ...] = ()
) -> Callable[[Callable[[FirstStep], Tensor]], Callable[[FirstStep], Tensor]]:
    """Register a function of a `FirstStep` as the score of its name.

    Args:
        description: what the number is, in a few words: it becomes the column's description.
        source: paper or project it comes from.
        needs: see `Detector`.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Callable[[FirstStep], Tensor]) -> Callable[[FirstStep], Tensor]:
        name = function.__name__
        if name in DETECTORS:
            raise ValueError(f"there is a detector {name} already")
        DETECTORS[name] = Detector(name, description, source, needs, function)
        return function

    return register


def scores(first: FirstStep) -> dict[str, Tensor]:
    """Every score that `first` has the facts for: name -> [B], float32."""
    return {
        name: found.function(first).float()
        for name, found in DETECTORS.items()
        if all(getattr(first, need) is not None for need in found.needs)
    }


@detector("||d||_2, first step", "Wen et al. 2024")
def magnitude(first: FirstStep) -> Tensor:
    """Magnitude of the noise difference, [B]: the baseline of the paper.

    Example:
        >>> import torch
        >>> magnitude(FirstStep.of(torch.ones(1, 4, 8, 8)))
        tensor([16.])
    """
    return pipelines.formulas.magnitude(first.energy)


@detector("||d * m||_2 / mean(m), first step, m the attention mask of mask_source", "Chen et al. 2025", ("mask",))
def ld(first: FirstStep) -> Tensor:
    """Localised detection score under an attention mask, [B]: always the paper's formula.

    Example:
        >>> import torch
        >>> left = torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(1, 8, 8)
        >>> ld(FirstStep.of(torch.ones(1, 4, 8, 8), mask=left))
        tensor([22.6274])
    """
    assert first.mask is not None
    return pipelines.formulas.ld(first.energy, first.mask)


@detector("ld with the smoothed energy map of the first step as its mask", "ours")
def ld_energy(first: FirstStep) -> Tensor:
    """LD under the first step's own energy mask, [B]: the noise difference localises itself.

    Example:
        >>> import torch
        >>> ld_energy(FirstStep.of(torch.ones(1, 4, 8, 8)))
        tensor([16.])
    """
    return pipelines.formulas.ld(first.energy, pipelines.formulas.energy_mask(first.energy))


@detector(
    "largest cell of the log energy map standardised by the run's own captions, over windows of 3, 5, 9 and all cells",
    "ours",
    ("null",),
)
def excess(first: FirstStep) -> Tensor:
    """How far the energy map stands out of what is usual at its place, under its noise, in this run, [B].

    Only scores of one run, or under the same null maps, can be compared.

    Example:
        >>> import torch
        >>> from pipelines.null_maps import NullMaps
        >>> others = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 8, 8)
        >>> null = NullMaps.of([others])  # median log 2, 84 % quantile log 2 + 0.68 log 2
        >>> excess(FirstStep.of(torch.full((1, 4, 8, 8), 2.0), null=null))  # energy 16: log 8 above the median
        tensor([4.4118])
    """
    assert first.null is not None
    null = first.null
    return pipelines.formulas.excess(pipelines.formulas.log_energy(first.energy), null.median, null.spread)


@detector(
    "largest cell of the log energy map, smoothed by 3 x 3, above what is usual there, of what the noise difference "
    "does not share with the run's calmer captions (less their mean and first 16 principal components); not for a "
    "list of which more than a fifth is copied",
    "ours",
    ("residual",),
)
def excess_pca(first: FirstStep) -> Tensor:
    """How far what is left of the noise difference stands out, [B]: a small copy shows that the common part covers."""
    assert first.residual is not None
    return pipelines.formulas.peak(first.residual.energy(first.difference), first.residual.usual)


@detector("sigma_max^2 mean(eps_cfg^2), first step", "Webster 2023", ("sigma_max",))
def webster(first: FirstStep) -> Tensor:
    """Webster's white-box one-step score, [B]; not defined where sigma_max is infinite."""
    assert first.sigma_max is not None
    return pipelines.formulas.webster(first.uncond, first.difference, first.guidance_scale, first.sigma_max)


@detector("entropy of the attention over tokens, first step", "Ren et al. 2024", ("token_attention",))
def attention_entropy(first: FirstStep) -> Tensor:
    """Entropy of the mean attention over tokens, [B]."""
    assert first.token_attention is not None
    return pipelines.formulas.attention_entropy(first.token_attention)


@detector("cosine of eps_0 and d, first step", "Asthana & Belagiannis 2026")
def cosine(first: FirstStep) -> Tensor:
    """Angle of the unconditional prediction and the noise difference, [B]."""
    return pipelines.formulas.cosine(first.uncond, first.difference)


@detector("cosine on pure noise at the third last timestep", "Asthana & Belagiannis 2026", ("low",))
def cosine_low(first: FirstStep) -> Tensor:
    """The same angle at a low noise level, fed pure noise, [B]."""
    assert first.low is not None
    return pipelines.formulas.cosine(first.low.uncond, first.low.difference)


@detector("magnitude + 2 cosine_low; + 0.1 cosine_low for Stable Diffusion 2", "Asthana & Belagiannis 2026", ("low",))
def anisotropy(first: FirstStep) -> Tensor:
    """Weighted sum of magnitude and `cosine_low`, [B]."""
    return pipelines.formulas.anisotropy(magnitude(first), cosine_low(first), first.anisotropy_weights)
