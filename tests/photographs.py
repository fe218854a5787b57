"""The pictures that scikit-image's wheel holds, and what people do to copies: for checks of the real SSCD."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

NAMES = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
]


def photographs() -> dict[str, Image.Image]:
    """All of them, RGB, by name."""
    folder = Path(skimage.__file__).parent / "data"
    return {name.split(".")[0]: Image.open(folder / name).convert("RGB") for name in NAMES}


def _box(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _hue(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 40) % 256), saturation, value)).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "middle 80 %": lambda image: _box(image, 0.1, 0.1, 0.9, 0.9),
    "corner 70 %": lambda image: _box(image, 0, 0, 0.7, 0.7),
    "JPEG quality 20": lambda image: _jpeg(image, 20),
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "hue turned": _hue,
    "bright, saturated": lambda image: ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(1.8)).enhance(1.3),
    "blur of 3 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
}


def confusion(
    describe: Callable[[list[Image.Image]], np.ndarray], threshold: float = 0.5
) -> tuple[dict[str, dict[str, float]], float]:
    """By change: cosines of each copy with its own picture; and the share of unrelated pairs above the threshold.

    Args:
        describe: pictures to unit vectors [n, D].
    Returns:
        {change: {picture: cosine}} and the share of (picture, copy of another picture) pairs over `threshold`.
    """
    pictures = photographs()
    originals = describe(list(pictures.values()))
    own, unrelated = {}, []
    for change, apply in CHANGES.items():
        cosines = originals @ describe([apply(picture) for picture in pictures.values()]).T
        own[change] = dict(zip(pictures, np.diag(cosines).tolist(), strict=True))
        unrelated.append(cosines[~np.eye(len(pictures), dtype=bool)])
    return own, float((np.concatenate(unrelated) > threshold).mean())
