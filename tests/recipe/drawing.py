"""Pictures as drawing instructions: drawn at random, then rendered.

A picture is a coloured, patterned ground of 64 x 64 with one to four sprites on it. The order of the random draws is
part of the testbed: a change here changes every picture and every caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import tau

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
MAX_SPRITES = 4
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 30),
    "yellow": (250, 214, 60),
    "green": (60, 160, 80),
    "teal": (20, 150, 150),
    "blue": (60, 110, 215),
    "navy": (25, 40, 105),
    "purple": (130, 70, 180),
    "pink": (245, 150, 190),
    "brown": (130, 85, 55),
    "gray": (135, 138, 145),
    "white": (245, 245, 242),
}
PATTERNS = ["plain", "gradient", "striped", "barred", "checkered", "dotted"]


@dataclass
class Specs:
    """Drawing instructions of N pictures."""

    ground: np.ndarray  # [N, 3] int: pattern, colour 1, colour 2
    phase: np.ndarray  # [N, 4] float in [0, 1): frequency and shifts of the pattern
    sprite: np.ndarray  # [N, 4] int: which sprite, -1 for none
    pose: np.ndarray  # [N, 4, 4] float: x, y (pixels), scale, angle (radians)

    def __getitem__(self, index: np.ndarray | slice) -> Specs:
        return Specs(self.ground[index], self.phase[index], self.sprite[index], self.pose[index])

    def __len__(self) -> int:
        return len(self.ground)

    def __add__(self, other: Specs) -> Specs:
        return Specs(
            np.concatenate([self.ground, other.ground]),
            np.concatenate([self.phase, other.phase]),
            np.concatenate([self.sprite, other.sprite]),
            np.concatenate([self.pose, other.pose]),
        )


def draw_specs(rng: np.random.Generator, n: int, n_sprites: int, low: int = 2, high: int = 3) -> Specs:
    """Instructions of `n` pictures with `low` to `high` sprites each."""
    count = rng.integers(low, high + 1, n)
    sprite = rng.integers(0, n_sprites, (n, MAX_SPRITES))
    present = np.arange(MAX_SPRITES)[None] < count[:, None]
    sprite[~present] = -1
    tries = rng.uniform(13, SIZE - 13, (6, n, MAX_SPRITES, 2))
    position = tries[_smallest_gap(tries, present).argmax(0), np.arange(n)]  # the try whose sprites lie furthest apart
    scale = rng.uniform(0.34, 0.52, (n, MAX_SPRITES, 1))
    angle = rng.uniform(-0.4, 0.4, (n, MAX_SPRITES, 1))
    color = rng.integers(0, len(COLORS), (n, 2))
    color[:, 1] = np.where(color[:, 0] == color[:, 1], (color[:, 1] + 5) % len(COLORS), color[:, 1])
    pattern = rng.integers(0, len(PATTERNS), (n, 1))
    return Specs(
        ground=np.concatenate([pattern, color], 1),
        phase=rng.uniform(0, 1, (n, 4)),
        sprite=sprite,
        pose=np.concatenate([position, scale, angle], -1),
    )


def _smallest_gap(position: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Smallest distance between two present sprites, [tries, N]."""
    far = 99.0
    gap = np.linalg.norm(position[:, :, :, None] - position[:, :, None], axis=-1) + far * np.eye(MAX_SPRITES)
    return np.where(present[None, :, :, None] & present[None, :, None], gap, far).min((2, 3))


def render(specs: Specs, bank: Tensor) -> Tensor:
    """Draw pictures.

    Args:
        specs: N instructions.
        bank: sprites, [S, 4, 48, 48] float in [0, 1], premultiplied alpha.
    Returns:
        [N, 3, 64, 64] float32 in [-1, 1].
    """
    image = _ground(specs)
    sprite = torch.as_tensor(specs.sprite)
    pose = torch.as_tensor(specs.pose, dtype=torch.float32)
    for k in range(MAX_SPRITES):
        has = sprite[:, k] >= 0
        if has.any():
            layer = _place(bank[sprite[has, k]], pose[has, k])
            image[has] = image[has] * (1 - layer[:, 3:]) + layer[:, :3]
    return image.clamp(0, 1) * 2 - 1


def _ground(specs: Specs) -> Tensor:
    """[N, 3, 64, 64] in [0, 1]: two colours mixed by the pattern."""
    n = len(specs)
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32) / 255
    ground = torch.as_tensor(specs.ground)
    phase = torch.as_tensor(specs.phase, dtype=torch.float32)[:, :, None, None]
    v, u = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    u, v = u[None], v[None]
    frequency = 2 + torch.floor(phase[:, 0] * 4)

    def stripes(turns: Tensor) -> Tensor:
        return torch.sigmoid(torch.sin(tau * turns) * 10)

    checks = torch.sin(tau * frequency * u) * torch.sin(tau * frequency * v)
    dots = torch.cos(tau * (frequency * u + phase[:, 1])) + torch.cos(tau * (frequency * v + phase[:, 2])) - 1.0
    patterns = torch.stack(  # in the order of PATTERNS
        [
            torch.zeros(n, SIZE, SIZE),
            v.expand(n, -1, -1),
            stripes(frequency * u + phase[:, 1]),
            stripes(frequency * v + phase[:, 1]),
            torch.sigmoid(checks * 20),
            torch.sigmoid(dots * 8),
        ]
    )
    mix = patterns[ground[:, 0], torch.arange(n)][:, None]
    return palette[ground[:, 1]][:, :, None, None] * (1 - mix) + palette[ground[:, 2]][:, :, None, None] * mix


def _place(sprites: Tensor, pose: Tensor) -> Tensor:
    """Sprites moved, scaled and turned onto the canvas, [M, 4, 64, 64]."""
    x, y, scale, angle = (pose * torch.tensor([2 / SIZE, 2 / SIZE, 1, 1])).unbind(-1)
    x, y = x - 1, y - 1
    c, d = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack(
        [torch.stack([c, d, -(c * x + d * y)], -1), torch.stack([-d, c, d * x - c * y], -1)],
        1,
    )
    grid = F.affine_grid(theta, [len(sprites), 4, SIZE, SIZE], align_corners=False)
    return F.grid_sample(sprites, grid, align_corners=False)
