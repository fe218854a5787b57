"""One generated image against training pictures: masked distances, masked correlation, the gate of the paper.

A masked distance alone says "alike" of any two plain regions. What the local verdict rests on is the correlation
distance under the sharpened mask: that distance, squared, relative to what two unrelated regions would have.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from audit.base.errors import AuditError
from audit.index import Index
from audit.run.schema import MASKS, TRAJECTORY_MASKS, VERDICTS

VERDICT_VERSION = 2  # in the fingerprint of matches and verdicts: raise it when one is measured or decided otherwise
COPY = 0.5  # sscd above which two pictures are copies (Chen et al. 2025)
LS_MASKS = {"ls_norm": "be_mask", "ls_energy": "energy_mask", "ls_score": "score_map"}
SHARP = 3  # power of the mask that weighs the correlation: small regions are not lost in what lies around them
PLAIN = 3 * 0.03**2  # contrast below which nothing is drawn: SSIM's constant (Wang et al. 2004), for three channels
_CACHE_BYTES = 256 << 20

Pixels = NDArray[np.uint8]
Masks = NDArray[np.float32]


def as_trained(picture: Image.Image, size: tuple[int, int]) -> Pixels:
    """Bring a picture to the generated size as training does: shorter side resized (antialiased), centre crop.

    Args:
        picture: RGB.
        size: (H, W).
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

    Safe to use from threads.

    Args:
        index: the index.
        size: (H, W) of the generated images.

    Attributes:
        unreadable: why a picture cannot be had any more, by id.
        cropped: whether training cut something off a picture, by id, of those that were read.
    """

    def __init__(self, index: Index, size: tuple[int, int]) -> None:
        self.index, self.size = index, size
        self.unreadable: dict[int, str] = {}
        self.cropped: dict[int, bool] = {}
        room = max(16, _CACHE_BYTES // (size[0] * size[1] * 3))
        self.pixels = functools.lru_cache(maxsize=room)(self._pixels)

    def _pixels(self, id: int) -> Pixels | None:
        """[H, W, 3] uint8, or None where the picture cannot be had any more (its reason is in `unreadable`)."""
        try:
            picture = self.index.picture(id)
        except AuditError as error:
            self.unreadable[id] = str(error)
            return None
        if picture is None:
            return None
        height, width = self.size
        # a pixel of the resized picture is no crop
        self.cropped[id] = abs(picture.width * height - picture.height * width) > max(picture.size)
        planes = np.ascontiguousarray(as_trained(picture, self.size).transpose(2, 0, 1))  # as comparisons read it
        return planes.transpose(1, 2, 0)

    def prefetch(self, ids: Iterable[int], pool: ThreadPoolExecutor) -> None:
        """Read pictures into memory, many at a time."""
        list(pool.map(self.pixels, dict.fromkeys(ids)))


def masks_at(masks: Masks, size: tuple[int, int]) -> Masks:
    """Masks [N, h, w] at pixel size [N, H, W], bilinear, float32."""
    import torch

    from pipelines.formulas import resize_mask

    return resize_mask(torch.from_numpy(np.array(masks, np.float32)), size).numpy()


class Compared(NamedTuple):
    """One image and one training picture.

    Attributes:
        plain: ||xhat - x||_2, pixels in [0, 1].
        distances: ||(xhat - x) m||_2 / mean(m) under each mask, [M].
        correlation_distances: 1 - concordance under each mask, [M], in [0, 2].
    """

    plain: float
    distances: NDArray[np.float64]
    correlation_distances: NDArray[np.float64]


class MaskedImage:
    """An image and its masks, ready to be compared with any number of pictures: its weights are made once.

    The masked distance weighs by m^2, the correlation by m^SHARP. With w those weights over their sum, E the mean
    under w over pixels, summed over channels, x the image and y the picture, the correlation distance is

        1 - 2 cov / (var x + var y + |E x - E y|^2 + PLAIN) = (D + PLAIN) / (D + 2 cov + PLAIN),  D = E|x - y|^2

    with cov, var under w: one minus the concordance correlation (Lin 1989) with the constant of SSIM. D is the paper's
    masked distance, squared, under the sharper weights; where image and picture have nothing in common, cov is 0.

    Args:
        image: [H, W, 3], uint8.
        masks: [M, h, w], non-negative; brought to H x W bilinearly.
    """

    def __init__(self, image: Pixels, masks: Masks) -> None:
        at_size = masks_at(masks, (image.shape[0], image.shape[1])).reshape(len(masks), -1)
        self.mean = at_size.mean(1, dtype=np.float64)
        squared, sharp = np.square(at_size), at_size**SHARP
        power = squared.sum(1, dtype=np.float64)
        self.norm = np.sqrt(power) / np.where(self.mean > 0, self.mean, 1)
        weights = np.concatenate([squared, sharp])
        total = weights.sum(1, dtype=np.float64)
        self._weights = weights.T / np.where(total > 0, total, 1).astype(np.float32)  # [H W, 2 M]
        self._image = _planes(image)  # [3, H W]
        self._centred = self._image - self._image.mean(1, keepdims=True)
        sharp = np.ascontiguousarray(self._weights[:, len(masks) :])
        self._means = (self._centred @ sharp).astype(np.float64)  # [3, M]
        second = (np.einsum("cp,cp->p", self._centred, self._centred) @ sharp).astype(np.float64)
        self._variance = np.maximum(second - np.square(self._means).sum(0), 0)

    def compare(self, picture: Pixels) -> Compared:
        """Compare with a picture of the same size, [H, W, 3], uint8."""
        d = np.empty((5, self._image.shape[1]), np.float32)
        np.subtract(_planes(picture), self._image, out=d[:3])
        np.einsum("cp,cp->p", d[:3], d[:3], out=d[3])
        np.einsum("cp,cp->p", self._centred, d[:3], out=d[4])
        every = (d @ self._weights).astype(np.float64)  # E of d by channel, of d^2, of x d
        squared, sums = np.split(every, 2, axis=1)  # [5, M] each
        covariance = self._variance + sums[4] - (self._means * sums[:3]).sum(0)  # of x and y = x + d
        difference = np.maximum(sums[3], 0)
        unlike = (difference + PLAIN) / (np.maximum(difference + 2 * covariance, 0) + PLAIN)
        plain = math.sqrt(float(d[3].sum(dtype=np.float64)))
        return Compared(plain, self.norm * np.sqrt(np.maximum(squared[3], 0)), np.clip(unlike, 0, 2))


def _planes(pixels: Pixels) -> NDArray[np.float32]:
    """[H, W, 3] uint8 as [3, H W] float32 in [0, 1]."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).reshape(3, -1).astype(np.float32)
    planes *= np.float32(1 / 255)
    return planes


def gate(distance: float, sscd: float) -> float:
    """-1[sscd < 0.5] * distance; the gate is strict as printed, so at exactly 0.5 the score is 0."""
    return -distance if sscd < COPY else 0.0


class Neighbour(NamedTuple):
    """A training picture an image is compared with: rank -1 is the caption's own beyond the nearest."""

    id: int
    sscd: float
    rank: int


def match_image(
    image: Pixels,
    image_index: int,
    masks: Mapping[str, Masks],
    neighbours: Sequence[Neighbour],
    own: int | None,
    references: References,
    facts: Mapping[int, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Compare one generated image with its neighbours and the caption's own picture.

    Args:
        image: [H, W, 3].
        image_index: which image of the caption.
        masks: `be_mask`, `first_mask`, `energy_mask`, `score_map` at latent size [H, W]; a model without attention
            masks has the last two.
        neighbours: what to compare with.
        own: id of the caption's own picture.
        references: the pictures.
        facts: key, url, caption of ids.
    Returns:
        one dict a comparison, columns MEASURED_COLUMNS; what takes pixels is missing where there are none.
    """
    names = [name for name in TRAJECTORY_MASKS if name in masks]
    masked = MaskedImage(image, np.stack([masks[name] for name in names]))
    matches = []
    for id, sscd, rank in neighbours:
        match: dict[str, Any] = {
            "image_index": image_index,
            "rank": rank,
            "own": id == own,
            "reference_id": id,
            **{f"reference_{name}": facts[id][name] for name in ("key", "url", "caption")},
            "sscd": sscd,
        }
        pixels = references.pixels(id)
        if pixels is not None:
            found = masked.compare(pixels)
            distances = dict(zip(names, found.distances.tolist(), strict=True))
            unlike = dict(zip(names, found.correlation_distances.tolist(), strict=True))
            match["s"] = gate(found.plain, sscd)
            if "be_mask" in distances:
                match["ls"] = gate(distances["be_mask"] * float(masked.mean[names.index("be_mask")]), sscd)
            match |= {column: gate(distances[mask], sscd) for column, mask in LS_MASKS.items() if mask in distances}
            match["ls_corr"] = gate(unlike["energy_mask"], sscd)
            there = {word: mask for word, mask in MASKS.items() if mask in distances}
            match |= {f"distance_{word}": distances[mask] for word, mask in there.items()}
            match |= {f"correlation_distance_{word}": unlike[mask] for word, mask in there.items()}
        elif id in references.unreadable:
            match["unreadable"] = references.unreadable[id]
        matches.append(match)
    return matches


def decide(match: Mapping[str, Any], match_mask: str, threshold: float, untold: str = "") -> dict[str, Any]:
    """A match as it is measured, under the match mask, with its verdict: MATCH_COLUMNS.

    Args:
        match: MEASURED_COLUMNS.
        match_mask: whose mask decides (key of schema.MASKS).
        threshold: correlation distances below it are local copies.
        untold: why there is no threshold yet (`Null.untold`): what is no global copy has no reference to judge it by.
    """
    by_mask = [f"{name}_{word}" for name in ("distance", "correlation_distance") for word in MASKS]
    kept = {name: value for name, value in match.items() if name not in by_mask}
    kept["distance"] = match.get(f"distance_{match_mask}")
    kept["correlation_distance"] = match.get(f"correlation_distance_{match_mask}")
    if untold and match.get("unreadable") is None and match["sscd"] <= COPY:
        kept["unreadable"] = f"no local threshold: {untold}"
    unreadable = kept.get("unreadable") is not None
    kept["verdict"] = (
        "no_reference" if unreadable else verdict_of(match["sscd"], kept["correlation_distance"], threshold)
    )
    return kept


def verdict_of(sscd: float, correlation_distance: float | None, threshold: float) -> str:
    """global when sscd > 0.5, else local when the correlation distance is below the threshold, else none."""
    if sscd > COPY:
        return "global"
    return "local" if correlation_distance is not None and correlation_distance < threshold else "none"


def best_verdict(verdicts: Sequence[str]) -> str:
    """The best of some verdicts; no_reference for none at all, and where something is left that was not compared.

    A copy is a copy whatever else could not be read; that there is none cannot be said then.
    """
    best = min(verdicts, key=VERDICTS.index, default="no_reference")
    return "no_reference" if best == "none" and "no_reference" in verdicts else best


def best_match(matches: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The match a candidate's verdict rests on: best verdict, then highest sscd (global) or correlation.

    A picture that could not be read has no distance and comes last.
    """

    def order(match: dict[str, Any]) -> tuple[int, float, float]:
        distance = match.get("correlation_distance")
        near = -match["sscd"] if match["verdict"] == "global" else math.inf if distance is None else distance
        return VERDICTS.index(match["verdict"]), near, -match["sscd"]

    return min(matches, key=order) if matches else None


def statistic_of(matches: Sequence[Mapping[str, Any]], match_mask: str) -> float | None:
    """Smallest correlation distance over all comparisons of all images of a caption; None where there is none."""
    found = [match.get(f"correlation_distance_{match_mask}") for match in matches]
    return min((value for value in found if value is not None), default=None)


def encode_reference(pixels: Pixels | None) -> bytes | None:
    """A reference picture as PNG."""
    if pixels is None:
        return None
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
