"""What is usual of the energy map in every cell, under every noise: what `excess` is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines import formulas


@dataclass(frozen=True)
class NullMaps:
    """Median and upper spread of the log energy of a sample of captions, [K, windows, H, W], float32; a row a noise.

    `residual` is what the sample's differences have in common, and what is usual of the rest; None where not known.
    """

    median: Tensor
    spread: Tensor
    residual: Residual | None = None

    @classmethod
    def of(cls, energies: Sequence[Tensor], residual: Residual | None = None) -> NullMaps:
        """From the first-step energy maps of the sample: K noises, [N, H, W] each; N may differ between them."""
        found = [formulas.null_maps(formulas.log_energy(each)) for each in energies]
        return cls(torch.stack([median for median, _ in found]), torch.stack([spread for _, spread in found]), residual)

    @classmethod
    def of_differences(cls, differences: Sequence[Tensor]) -> NullMaps:
        """From the sample's first-step noise differences: K noises, [N, C, H, W] each."""
        parts = [formulas.common_parts(each) for each in differences]
        left = [formulas.less_common(each, part) for each, part in zip(differences, parts, strict=True)]
        residual = Residual.of(parts, [formulas.energy_map(each) for each in left])
        return cls.of([formulas.energy_map(each) for each in differences], residual)

    def take(self, noises: Tensor) -> NullMaps:
        """A row for every noise named, [B], on the CPU."""
        rows = noises.to(self.median.device)
        return NullMaps(self.median[rows], self.spread[rows], self.residual and self.residual.take(noises))

    def to(self, device: torch.device) -> NullMaps:
        """The same on a device."""
        return NullMaps(self.median.to(device), self.spread.to(device), self.residual and self.residual.to(device))


@dataclass(frozen=True)
class Residual:
    """What a sample's noise differences have in common, and what is usual of the energy that is left of them.

    Attributes:
        parts: `formulas.common_parts` of every noise, [K, 1 + R, C, H, W], float32.
        usual: median of the log energy that is left, smoothed 3 x 3, [K, H, W], float32; once taken a row of it each.
        noises: of the rows it was taken for, [B], on the CPU; None before.
    """

    parts: Tensor
    usual: Tensor
    noises: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[Tensor], energies: Sequence[Tensor]) -> Residual:
        """From the common parts of K noises, and the energy maps that are left of the sample, [N, H, W] each."""
        logs = (formulas.log_energy(each, formulas.PEAK_WINDOWS)[:, 0] for each in energies)
        return cls(torch.stack(list(parts)), torch.stack([formulas.null_maps(each)[0] for each in logs]))

    def take(self, noises: Tensor) -> Residual:
        """For rows of the noises named, [B]; the parts, large as they are, stay one a noise."""
        return Residual(self.parts, self.usual[noises.to(self.usual.device)], noises)

    def to(self, device: torch.device) -> Residual:
        """The same on a device."""
        return Residual(self.parts.to(device), self.usual.to(device), self.noises)

    def energy(self, difference: Tensor) -> Tensor:
        """Energy that is left of the rows' noise differences [B, C, H, W]: [B, H, W], float32."""
        assert self.noises is not None, "take the rows' noises first"
        left = difference.new_empty(difference.shape, dtype=torch.float32)
        for noise in self.noises.unique().tolist():
            rows = (self.noises == noise).nonzero().flatten().to(difference.device)
            left[rows] = formulas.less_common(difference[rows], self.parts[noise])
        return formulas.energy_map(left)
