"""A copy descriptor in closed form, called like SSCD; SSCD itself is made for photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recipe.dataset import Pictures, to_float
from tests.recipe.training import log

DIM, FITTED, HELD_OUT = 512, 12_000, 1_000
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class CopyDescriptor(nn.Module):
    """ImageNet-normalised [B, 3, H, W] in, L2-normalised [B, 512] out.

    The picture and its edges are reduced to 16 x 16, then whitened with the statistics of the training pictures, so
    that unrelated pictures are near orthogonal and the cosine falls with the part of the picture that differs.
    """

    def __init__(self, mean: Tensor, whiten: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.whiten: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("whiten", whiten)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize((_features(x) - self.mean) @ self.whiten, dim=1)


def _features(x: Tensor) -> Tensor:
    """Colours and edges at 16 x 16, [B, 1024]."""
    x = F.interpolate(x.float(), size=(64, 64), mode="bilinear", align_corners=False, antialias=True)
    grey = x.mean(1, keepdim=True)
    dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    edges = F.pad((dx * dx + dy * dy + 1e-4).sqrt(), [1, 1, 1, 1])
    return torch.cat([F.adaptive_avg_pool2d(x, 16).flatten(1), F.adaptive_avg_pool2d(edges, 16).flatten(1)], 1)


def imagenet_normalise(pictures: Tensor) -> Tensor:
    """[-1, 1] -> ImageNet-normalised, as the descriptor takes them."""
    return ((pictures + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD


def fit_descriptor(pictures: Pictures) -> CopyDescriptor:
    """Whiten with the general pictures; logs the cosines of unrelated pictures and of blurred, noisy copies."""
    general = pictures.general_pictures
    held_out = min(HELD_OUT, len(general) // 4)
    known = to_float(general[: min(FITTED, len(general) - held_out)])
    features = torch.cat([_features(imagenet_normalise(x)) for x in known.split(500)])
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((features - mean).T).double())
    values, vectors = values.flip(0)[:DIM], vectors.flip(1)[:, :DIM]
    floor = values[DIM - 12].clamp(min=1e-9)  # the weakest directions are noise: do not blow them up
    net = CopyDescriptor(mean, (vectors / (values.clamp(min=0) + floor).sqrt()).float())

    new = to_float(general[-held_out:])
    copies = (F.avg_pool2d(new, 3, 1, 1) * 0.9 + 0.1 * torch.randn_like(new)).clamp(-1, 1)
    own, other, copied = (net(imagenet_normalise(x)) for x in (new, known, copies))
    unrelated = (own @ other.T).amax(1).quantile(torch.tensor([0.5, 0.95, 0.99]))
    kept = (own * copied).sum(1).quantile(torch.tensor([0.05, 0.5]))
    log(f"descriptor: best unrelated match 50/95/99 % {unrelated.tolist()}, blurred copies 5/50 % {kept.tolist()}")
    return net
