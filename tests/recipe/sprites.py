"""Cut 32 emoji out of the Noto Color Emoji font (SIL OFL 1.1) into sprites.

    python -m tests.recipe.sprites OUT.npz [--font NotoColorEmoji.ttf]

The result is kept beside this file (sprites.npz), so only a change of the list needs the font.
"""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from audit.base.errors import AuditError

SIDE = 48
DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE, GLYPH = 109, (136, 128)  # the one size of the font's bitmaps, and what they measure

UNICODE_NAMES = {
    "apple": "RED APPLE",
    "banana": "BANANA",
    "lemon": "LEMON",
    "grapes": "GRAPES",
    "watermelon": "WATERMELON",
    "strawberry": "STRAWBERRY",
    "carrot": "CARROT",
    "mushroom": "MUSHROOM",
    "pizza": "SLICE OF PIZZA",
    "doughnut": "DOUGHNUT",
    "cat": "CAT FACE",
    "dog": "DOG FACE",
    "panda": "PANDA FACE",
    "frog": "FROG FACE",
    "fox": "FOX FACE",
    "pig": "PIG FACE",
    "fish": "TROPICAL FISH",
    "octopus": "OCTOPUS",
    "butterfly": "BUTTERFLY",
    "sunflower": "SUNFLOWER",
    "cactus": "CACTUS",
    "tree": "DECIDUOUS TREE",
    "house": "HOUSE BUILDING",
    "rocket": "ROCKET",
    "car": "AUTOMOBILE",
    "boat": "SAILBOAT",
    "balloon": "BALLOON",
    "ball": "SOCCER BALL",
    "crown": "CROWN",
    "gem": "GEM STONE",
    "star": "GLOWING STAR",
    "guitar": "GUITAR",
}


class Sprites(NamedTuple):
    """The things that pictures show."""

    names: list[str]
    rgba: np.ndarray  # [S, 48, 48, 4] uint8


def load(path: Path) -> Sprites:
    """Read what `save` wrote."""
    with np.load(path) as file:
        return Sprites(file["names"].tolist(), file["rgba"])


def save(sprites: Sprites, path: Path) -> None:
    """Write sprites as one compressed npz."""
    np.savez_compressed(path, rgba=sprites.rgba, names=np.array(sprites.names))


def cut(font: Path) -> Sprites:
    """Draw every emoji, crop it, centre it on a square and bring it to 48 x 48.

    Raises:
        AuditError: there is no such font file, or it has no bitmaps of 109 pixels as Noto Color Emoji has.
    """
    if not font.is_file():
        raise AuditError(f"{font}: no such font; install Debian's fonts-noto-color-emoji or name the file with --font")
    try:
        face = ImageFont.truetype(str(font), FONT_SIZE)
    except OSError as error:
        raise AuditError(f"{font}: not the Noto Color Emoji bitmap font ({error}); name it with --font") from error
    return Sprites(list(UNICODE_NAMES), np.stack([_sprite(face, name) for name in UNICODE_NAMES.values()]))


def _sprite(face: ImageFont.FreeTypeFont, unicode_name: str) -> np.ndarray:
    glyph = Image.new("RGBA", GLYPH, (0, 0, 0, 0))
    ImageDraw.Draw(glyph).text((0, 0), unicodedata.lookup(unicode_name), font=face, embedded_color=True)
    glyph = glyph.crop(glyph.getbbox())
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cut the sprites out of the Noto Color Emoji font.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", type=Path, default=DEBIAN_FONT)
    args = parser.parse_args(argv)
    try:
        sprites = cut(args.font)
    except AuditError as error:
        parser.error(str(error))
    save(sprites, args.out)
    print(f"{len(sprites.names)} sprites in {args.out}")


if __name__ == "__main__":
    main()
