"""What is usual of the energy map in every cell, under every noise: what `excess` is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines import formulas


@dataclass(frozen=True)
class NullMaps:
    """Median and upper spread of the log energy of a sample of captions, [K, windows, H, W], float32; a row a noise."""

    median: Tensor
    spread: Tensor

    @classmethod
    def of(cls, energies: Sequence[Tensor]) -> NullMaps:
        """From the first-step energy maps of the sample: K noises, [N, H, W] each; N may differ between them."""
        found = [formulas.null_maps(formulas.log_energy(each)) for each in energies]
        return cls(torch.stack([median for median, _ in found]), torch.stack([spread for _, spread in found]))

    def take(self, noises: Tensor) -> NullMaps:
        """A row for every noise named, [B]."""
        noises = noises.to(self.median.device)
        return NullMaps(self.median[noises], self.spread[noises])

    def to(self, device: torch.device) -> NullMaps:
        """The same on a device."""
        return NullMaps(self.median.to(device), self.spread.to(device))
