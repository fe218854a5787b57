"""Is a generated image a copy, of what, and where: SSCD finds, the masked distance localises, a null decides.

Verdict of an image: `global` when sscd > 0.5 against a training picture; else `local` when the masked distance to one
is below the local threshold (audit/verdicts/null.py); else `none`.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from audit.base.errors import AuditError
from audit.index import Index
from audit.run.schema import MASKS, TRAJECTORY_MASKS, VERDICTS
from audit.statistics.null import Null

COPY = 0.5  # sscd above which two pictures are copies (Chen et al. 2025)
LS_MASKS = {"ls_norm": "be_mask", "ls_energy": "energy_mask", "ls_score": "score_map"}
_CACHE_BYTES = 256 << 20

Pixels = NDArray[np.uint8]
Masks = NDArray[np.float32]


def as_trained(picture: Image.Image, size: tuple[int, int]) -> Pixels:
    """Bring a picture to the generated size as training does: shorter side resized (antialiased), centre crop.

    Args:
        picture: RGB. size: (H, W).
    Returns:
        [H, W, 3], uint8.
    """
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    image = picture if scaled == picture.size else picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)).convert("RGB"))


class References:
    """Training pictures of an index at the generated size, remembered while they fit a quarter of a gigabyte.

    Args:
        index: the index. size: (H, W) of the generated images.
    """

    def __init__(self, index: Index, size: tuple[int, int]) -> None:
        self.index, self.size = index, size
        self.unreadable: dict[int, str] = {}
        room = max(16, _CACHE_BYTES // (size[0] * size[1] * 3))
        self.pixels = functools.lru_cache(maxsize=room)(self._pixels)

    def _pixels(self, id: int) -> Pixels | None:
        """[H, W, 3] uint8, or None where the picture cannot be had any more (its reason is in `unreadable`)."""
        try:
            picture = self.index.picture(id)
        except AuditError as error:
            self.unreadable[id] = str(error)
            return None
        return None if picture is None else as_trained(picture, self.size)


def masks_at(masks: Masks, size: tuple[int, int]) -> Masks:
    """Masks [N, h, w] at pixel size [N, H, W], bilinear, float32."""
    import torch

    from pipelines.formulas import resize_mask

    return resize_mask(torch.from_numpy(np.array(masks, np.float32)), size).numpy()


def masked_distances(generated: Pixels, references: Sequence[Pixels], masks: Masks) -> NDArray[np.float64]:
    """||(xhat - x) m||_2 / mean(m), pixels in [0, 1], of one image to R references under M masks.

    Args:
        generated: [H, W, 3]. references: R of the same. masks: [M, H, W].
    Returns:
        [M, R].
    """
    difference = np.stack([generated.astype(np.float32) - other for other in references]) / 255
    squared = np.square(difference).sum(-1)  # [R, H, W]
    weights = np.square(masks.astype(np.float64)).reshape(len(masks), -1)
    norms = np.sqrt(weights @ squared.reshape(len(references), -1).T.astype(np.float64))
    return norms / masks.astype(np.float64).mean((1, 2))[:, None]


def gate(distance: float, sscd: float) -> float:
    """-1[sscd < 0.5] * distance; the gate is strict as printed, so at exactly 0.5 the score is 0."""
    return -distance if sscd < COPY else 0.0


def match_image(
    image: Pixels,
    image_index: int,
    masks: dict[str, Masks],
    match_mask: str,
    neighbours: Sequence[tuple[int, float, int]],
    own: int | None,
    references: References,
    facts: dict[int, dict[str, Any]],
    null: Null,
) -> list[dict[str, Any]]:
    """Compare one generated image with its neighbours and the caption's own picture.

    Args:
        image: [H, W, 3]. masks: `be_mask`, `first_mask`, `energy_mask`, `score_map` at latent size [H, W]; a model
            without attention masks has the last two.
        match_mask: whose mask decides (key of schema.MASKS).
        neighbours: (id, sscd, rank); the own picture with rank -1 where it is not among the nearest.
        own: id of the caption's own picture. facts: key, url, caption of ids.
        null: the local threshold and the p-values; a distance below the threshold is a local copy.
    Returns:
        one dict a comparison, columns MATCH_COLUMNS.
    """
    names = [name for name in TRAJECTORY_MASKS if name in masks]
    at_size = masks_at(np.stack([masks[name] for name in names]), image.shape[:2])
    matches = []
    for id, sscd, rank in neighbours:
        pixels = references.pixels(id)
        match: dict[str, Any] = {
            "image_index": image_index,
            "rank": rank,
            "own": id == own,
            "reference_id": id,
            **{f"reference_{name}": facts[id][name] for name in ("key", "url", "caption")},
            "sscd": sscd,
        }
        distance = None
        if pixels is not None:
            distances = dict(zip(names, masked_distances(image, [pixels], at_size)[:, 0].tolist(), strict=True))
            plain = float(np.sqrt(np.square((image.astype(np.float64) - pixels) / 255).sum()))
            match["s"] = gate(plain, sscd)
            if "be_mask" in distances:
                mean = float(at_size[names.index("be_mask")].mean(dtype=np.float64))
                match["ls"] = gate(distances["be_mask"] * mean, sscd)
            match |= {column: gate(distances[mask], sscd) for column, mask in LS_MASKS.items() if mask in distances}
            distance = distances[MASKS[match_mask]]
            match["distance"] = distance
            match["p_value"] = null.p_value(distance)
        match["verdict"] = verdict_of(sscd, distance, null.threshold)
        matches.append(match)
    return matches


def verdict_of(sscd: float, distance: float | None, threshold: float) -> str:
    """global when sscd > 0.5, else local when the distance is below the threshold, else none."""
    if sscd > COPY:
        return "global"
    return "local" if distance is not None and distance < threshold else "none"


def best_verdict(verdicts: Sequence[str]) -> str:
    """The best of some verdicts; no_reference for none at all."""
    return min(verdicts, key=VERDICTS.index, default="no_reference")


def best_match(matches: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The match a candidate's verdict rests on: best verdict, then highest sscd (global) or smallest distance.

    A picture that could not be read has no distance and comes last.
    """

    def order(match: dict[str, Any]) -> tuple[int, float, float]:
        distance = match.get("distance")
        near = -match["sscd"] if match["verdict"] == "global" else math.inf if distance is None else distance
        return VERDICTS.index(match["verdict"]), near, -match["sscd"]

    return min(matches, key=order) if matches else None


def encode_reference(pixels: Pixels | None) -> bytes | None:
    """A reference picture as PNG."""
    if pixels is None:
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
