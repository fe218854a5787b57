"""Is a generated image a copy, of what, and where: SSCD finds, the masked distance localises, a null decides.

Verdict of an image: `global` when sscd > 0.5 against a training picture; else `local` when the masked distance to one
is below the local threshold; else `none`. The threshold needs no labels: it is a low quantile of the same measure
between DIFFERENT training pictures.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from audit.errors import AuditError

if TYPE_CHECKING:
    from audit.index import Index

COPY = 0.5  # sscd above which two pictures are copies (Chen et al. 2025)
VERDICTS = ("global", "local", "none", "no_reference")  # best first
MATCH_MASKS = {"final": "be_mask", "first": "first_mask", "energy": "energy_mask"}
LS_MASKS = {"ls_norm": "be_mask", "ls_energy": "energy_mask", "ls_score": "score_map"}
_CACHE_BYTES = 256 << 20
_SPARE = 8  # neighbours asked for beyond k, since near-duplicates are left out

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


@dataclass(frozen=True)
class Null:
    """The measure between different training pictures, and the threshold it gives.

    Attributes:
        distances: of each sampled picture the smallest distance to its k nearest others, sorted.
        threshold: below it a distance is a local copy: its p-value is at most the per-image false-positive rate.
        low, high: 95 % interval of the quantile at that rate.
        fpr: the rate asked for per candidate; per_image: per image.
        pictures: how many were sampled; near_duplicates: pairs with sscd > 0.5 left out.
    """

    distances: NDArray[np.float64]
    threshold: float
    low: float
    high: float
    fpr: float
    per_image: float
    pictures: int
    near_duplicates: int

    def p_value(self, distance: float) -> float:
        """(1 + distances at or below) / (1 + sample): never zero, as a finite sample can promise no less."""
        below = int(np.searchsorted(self.distances, distance, side="right"))
        return (1 + below) / (1 + len(self.distances))

    def facts(self) -> dict[str, Any]:
        """What is stored with the verdicts."""
        return {
            "threshold": _finite(self.threshold),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "match_fpr": self.fpr,
            "per_image_fpr": self.per_image,
            "pictures": self.pictures,
            "near_duplicates_left_out": self.near_duplicates,
            "distances": [float(value) for value in self.distances],
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Null:
        infinite = lambda value: float("-inf") if value is None else float(value)  # noqa: E731
        return cls(
            np.array(facts["distances"], float),
            infinite(facts["threshold"]),
            infinite(facts["low"]),
            infinite(facts["high"]),
            facts["match_fpr"],
            facts["per_image_fpr"],
            facts["pictures"],
            facts["near_duplicates_left_out"],
        )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def local_null(
    index: Index, references: References, masks: Masks, k: int, fpr: float, num_images: int, sample: int, seed: int
) -> Null:
    """Calibrate the local threshold on pairs of different training pictures.

    Of a seeded sample of indexed pictures, each under one mask drawn from the run, the smallest masked distance to the
    k nearest other pictures. Near-duplicates (sscd > 0.5) are repeats in the training set, not different pictures:
    such pairs are left out, and of a group of them only the first picture is sampled. So a data set full of repeats
    neither hides its own copies nor moves the threshold. A candidate has `num_images` chances: the rate per image is
    1 - (1 - fpr)^(1 / num_images). Below the threshold every p-value is at most that; -inf where so few pictures can
    promise no such rate.

    Args:
        masks: match masks of the run at pixel size, [N, H, W].
        sample: pictures to use, at most.
    Raises:
        AuditError: fewer than 20 pictures can be compared.
    """
    from audit.intervals import threshold_at_fpr

    ids = index.ids()
    keys = _hash(ids, seed)
    order = np.argsort(keys, kind="stable")  # by hash: what is added to the index later does not reshuffle the sample
    best: list[float] = []
    near = 0
    for start in range(0, len(order), 64):
        block = ids[order[start : start + 64]]
        found, cosines = index.search(index.vectors(block), min(len(index), k + 1 + _SPARE))
        for row, id in enumerate(block):
            others = (found[row] != id) & (found[row] >= 0)
            repeats = others & (cosines[row] > COPY)
            near += int(repeats.sum())
            if (found[row][repeats] < id).any():
                continue
            nearest = found[row][others & ~repeats][:k]
            own = references.pixels(int(id))
            pixels = [each for each in (references.pixels(int(other)) for other in nearest) if each is not None]
            if own is not None and pixels:
                mask = masks[int(keys[order[start + row]] % np.uint64(len(masks)))]
                best.append(float(masked_distances(own, pixels, mask[None]).min()))
        if len(best) >= sample:
            break
    if len(best) < 20:
        raise AuditError(
            f"{index.folder.url}: only {len(best)} pictures to calibrate the local threshold on, 20 are needed: "
            "index more pictures, or give --ls-threshold"
        )
    distances = np.sort(best[:sample])
    per_image = 1 - (1 - fpr) ** (1 / num_images)
    at = threshold_at_fpr(-distances, per_image)
    allowed = math.floor(per_image * (len(distances) + 1) + 1e-9) - 1  # null distances below the threshold
    threshold = float(distances[allowed]) if allowed >= 0 else -math.inf
    return Null(distances, threshold, -at.high, -at.low, fpr, per_image, len(distances), near)


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of each id."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def match_image(
    image: Pixels,
    image_index: int,
    masks: dict[str, Masks],
    match_mask: str,
    neighbours: Sequence[tuple[int, float, int]],
    own: int | None,
    references: References,
    facts: dict[int, dict[str, Any]],
    threshold: float,
    null: Null | None,
) -> list[dict[str, Any]]:
    """Compare one generated image with its neighbours and the caption's own picture.

    Args:
        image: [H, W, 3]. masks: `be_mask`, `first_mask`, `energy_mask`, `score_map` at latent size [H, W].
        match_mask: whose mask decides (key of MATCH_MASKS).
        neighbours: (id, sscd, rank); the own picture with rank -1 where it is not among the nearest.
        own: id of the caption's own picture. facts: key, url, caption of ids.
        threshold: the local threshold; a distance below it is a local copy.
    Returns:
        one dict a comparison, columns MATCH_COLUMNS.
    """
    names = ["be_mask", "first_mask", "energy_mask", "score_map"]
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
            match["ls"] = gate(distances["be_mask"] * float(at_size[0].mean(dtype=np.float64)), sscd)
            match |= {column: gate(distances[mask], sscd) for column, mask in LS_MASKS.items()}
            distance = distances[MATCH_MASKS[match_mask]]
            match["distance"] = distance
            match["p_value"] = null.p_value(distance) if null else None
        match["verdict"] = verdict_of(sscd, distance, threshold)
        matches.append(match)
    return matches


def verdict_of(sscd: float, distance: float | None, threshold: float) -> str:
    """global when sscd > 0.5, else local when the distance is below the threshold, else none."""
    if sscd > COPY:
        return "global"
    return "local" if distance is not None and distance < threshold else "none"


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
