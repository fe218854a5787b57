"""The testbed's world: captioned pictures of which the truth is known.

global  one caption, one fixed picture, repeated many times in training
local   a template: one region of the picture is fixed, the rest is drawn anew each time
none    a caption whose picture is seen once at most

The order of the random draws is part of the testbed, as in drawing.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.recipe.drawing import COLORS, PATTERNS, SIZE, Specs, draw_specs, render
from tests.recipe.sprites import Sprites

LISTS = ["{s}", "a picture of {s}", "a print of {s}", "{s}, flat illustration", "a poster with {s}", "sticker of {s}"]
GROUNDS = ["{s} on {c}", "{s} on a {c} ground", "{s}, {p}", "{s} on a {c} {p} ground"]
# fmt: off
KINDS = ["Podcast", "Curtain Panel", "Tapestry", "Phone Case", "Tote Bag", "Rug", "Novel", "Album", "Wall Clock",
         "Canvas", "Blanket", "Calendar", "Mug", "Pillow"]
ONSETS = ["b", "br", "c", "cl", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t",
          "tr", "v", "w", "z"]
# fmt: on
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
TITLES = ["The {x} {y} {k}", "{x} {k} by {y}", "{y} - {x} {k}", "{k}: {x} & {y}", "{x} {y} {k}", "{x}'s {y} {k}"]
CODAS = ["", "n", "r", "l", "s", "x", "m"]

GLOBAL, TEMPLATES = 24, 16  # of each of the two kinds, common and rare
VARIANTS = 8  # captions of a template


class World:
    """Every caption and picture that a seed makes.

    Attributes:
        names: of the sprites.
        bank: the sprites as `render` takes them.
        global_captions, global_specs, global_weight: the repeated pictures; weight is relative repetition.
        template_names, template_specs, template_weight: the templates; `template_specs` draws the fixed region.
        regions: [templates, 64, 64] bool, the fixed region.
        variants: [templates, 8] int, the sprites that a template's captions name.
    """

    def __init__(self, sprites: Sprites, seed: int = 0, common_only: bool = False) -> None:
        self.seed = seed
        self.names = sprites.names
        rgba = torch.from_numpy(sprites.rgba).permute(0, 3, 1, 2).float() / 255
        self.bank = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)

        rng = np.random.default_rng([seed, 1])
        self.global_specs, self.global_captions = self._draw_global(rng)
        self.global_weight = log_uniform(rng, 0.1, 1, GLOBAL)
        self.template_specs = draw_specs(rng, TEMPLATES, len(self.names), 3, 4)
        self.regions = _regions(rng, low=0.3, high=0.6, size=(0.5, 0.95))
        self.template_names = [title(rng) for _ in range(TEMPLATES)]
        self.template_weight = log_uniform(rng, 0.15, 1, TEMPLATES)
        self.variants = self._draw_variants(rng)
        if not common_only:
            self._add_rare()

    def _add_rare(self) -> None:
        """The hard cases: pictures repeated seldom, templates with a small fixed region."""
        rng = np.random.default_rng([self.seed, 5])
        specs, captions = self._draw_global(rng)
        self.global_specs += specs
        self.global_captions += captions
        self.global_weight = np.concatenate([self.global_weight, log_uniform(rng, 0.006, 0.12, GLOBAL)])
        self.template_specs += draw_specs(rng, TEMPLATES, len(self.names), 3, 4)
        self.regions = np.concatenate([self.regions, _regions(rng, low=0.07, high=0.25, size=(0.25, 0.6))])
        self.template_names += [title(rng) for _ in range(TEMPLATES)]
        self.template_weight = np.concatenate([self.template_weight, log_uniform(rng, 0.01, 0.25, TEMPLATES)])
        self.variants = np.concatenate([self.variants, self._draw_variants(rng)])

    def _draw_global(self, rng: np.random.Generator) -> tuple[Specs, list[str]]:
        specs = draw_specs(rng, GLOBAL, len(self.names), 3, 4)
        return specs, [
            title(rng) if i % 2 else describe(rng, specs.ground[i], specs.sprite[i], self.names) for i in range(GLOBAL)
        ]

    def _draw_variants(self, rng: np.random.Generator) -> np.ndarray:
        return np.stack([rng.choice(len(self.names), VARIANTS, replace=False) for _ in range(TEMPLATES)])

    def sample_general(self, n: int, seed: int) -> tuple[Specs, list[str]]:
        """`n` pictures that are seen once; one caption in five is a title that says nothing of the picture.

        Another `n` is another sample, not a longer one.
        """
        rng = np.random.default_rng([self.seed, 2, seed])
        specs = draw_specs(rng, n, len(self.names))
        return specs, [
            title(rng) if rng.random() < 0.2 else describe(rng, specs.ground[i], specs.sprite[i], self.names)
            for i in range(n)
        ]

    def sample_local(self, n: int, seed: int) -> tuple[np.ndarray, Specs, list[str]]:
        """`n` template pictures: [n] template index, instructions of the part that varies, captions."""
        rng = np.random.default_rng([self.seed, 3, seed])
        template = rng.choice(len(self.template_weight), n, p=self.template_weight / self.template_weight.sum())
        specs = draw_specs(rng, n, len(self.names), 2, 3)
        specs.sprite[:, 0] = self.variants[template, rng.integers(0, VARIANTS, n)]
        captions = [self.template_caption(t, s) for t, s in zip(template, specs.sprite[:, 0], strict=True)]
        return template, specs, captions

    def template_caption(self, template: int | np.integer, sprite: int | np.integer) -> str:
        """ "TITLE - thing"."""
        return f"{self.template_names[template]} - {self.names[sprite]}"

    def render_local(self, template: np.ndarray, specs: Specs) -> Tensor:
        """Template pictures, [N, 3, 64, 64] in [-1, 1]: the fixed region from the template, the rest from `specs`."""
        fixed = torch.as_tensor(self.regions[template])[:, None]
        return torch.where(fixed, render(self.template_specs[template], self.bank), render(specs, self.bank))


def word(rng: np.random.Generator) -> str:
    """A made-up name of two syllables."""
    syllables = [str(rng.choice(part)) for _ in range(2) for part in (ONSETS, VOWELS, CODAS)]
    return "".join(syllables).capitalize()


def title(rng: np.random.Generator) -> str:
    """The title of a product, which says nothing of the picture."""
    pattern = str(rng.choice(TITLES))
    return pattern.format(x=word(rng), y=word(rng), k=str(rng.choice(KINDS)))


def describe(rng: np.random.Generator, ground: np.ndarray, sprites: np.ndarray, names: list[str]) -> str:
    """A caption that names the sprites and, in two of five cases, something of the ground; never where things are."""
    things = [("an " if names[i][0] in "aeio" else "a ") + names[i] for i in sprites if i >= 0]
    text = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    text = str(rng.choice(LISTS)).format(s=text)
    if rng.random() < 0.4:
        text = str(rng.choice(GROUNDS)).format(s=text, c=list(COLORS)[ground[1]], p=PATTERNS[ground[0]])
    return text


def log_uniform(rng: np.random.Generator, low: float, high: float, n: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), n))


def _regions(rng: np.random.Generator, low: float, high: float, size: tuple[float, float]) -> np.ndarray:
    return np.stack([_region(rng, low, high, size) for _ in range(TEMPLATES)])


def _region(rng: np.random.Generator, low: float, high: float, size: tuple[float, float]) -> np.ndarray:
    """A box, an ellipse, all but a box or a slanted band, [64, 64] bool, covering `low` to `high` of the picture."""
    v, u = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    while True:
        kind = rng.integers(0, 4)
        w, h = rng.uniform(*size, 2)
        x, y = rng.uniform(0, 1 - size[0] - 0.1, 2)
        slant, edge = rng.uniform(-0.5, 0.5), rng.uniform(low + 0.05, high + 0.05)
        box = (u >= x) & (u < x + w) & (v >= y) & (v < y + h)
        ellipse = ((u - x - w / 2) / (w / 2)) ** 2 + ((v - y - h / 2) / (h / 2)) ** 2 < 1
        region = [box, ellipse, ~box, u + v * slant < edge][kind]
        if low < region.mean() < high:
            return region
