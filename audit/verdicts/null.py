"""What images look like that copy nothing: of clean captions, or, where there are none, different training pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.base.progress import Progress
from audit.index import Index
from audit.statistics.null import PICTURES, Null, sample_needed
from audit.verdicts.compare import COPY, MaskedImage, Masks
from audit.verdicts.crops import TrainingCrops

_SPARE = 8  # neighbours asked for beyond those compared, since near-duplicates are left out
_SEARCHED, _COMPARED = 256, 16  # pictures at a time: what is compared together stays in memory with its neighbours
NEAR = 0.25  # a cosine of whole pictures from which their crops are looked at: no crop seen doubles a cosine


@dataclass(frozen=True)
class NullPictures:
    """Different training pictures, before a mask is known.

    Attributes:
        keys: hash of each sampled picture, uint64 [n]: which mask it is given.
        ids: of the sampled pictures, [n].
        others: of each (id, sscd) of its nearest different pictures, nearest first.
        near_duplicates: pairs left out.
    """

    keys: NDArray[np.uint64]
    ids: NDArray[np.int64]
    others: list[list[tuple[int, float]]]
    near_duplicates: int

    def __len__(self) -> int:
        return len(self.ids)


def draw_pictures(index: Index, comparisons: int, sample: int, seed: int) -> NullPictures:
    """A seeded sample of indexed pictures that have pixels with their nearest different ones; only vectors are read.

    Near-duplicates (sscd > 0.5) are repeats in the training set, not different pictures: such pairs are left out, and
    of a group of them only the first picture is sampled. So a data set full of repeats neither hides its own copies nor
    moves the threshold.

    Args:
        index: the pictures.
        comparisons: pictures each is compared with: as many as a generated image is.
        sample: pictures to use, at most.
        seed: of the sample; what is added to the index later does not reshuffle it.
    """
    ids = index.seen()
    keys = _hash(ids, seed)
    order = np.argsort(keys, kind="stable")
    drawn: list[int] = []
    others: list[list[tuple[int, float]]] = []
    near = 0
    for start in range(0, len(order), _SEARCHED):
        if len(drawn) >= sample:
            break
        block = order[start : start + _SEARCHED]
        found, cosines = index.search(index.vectors(ids[block]), min(len(index), comparisons + 1 + _SPARE))
        for row, at in enumerate(block):
            different = (found[row] != ids[at]) & (ids[np.searchsorted(ids[:-1], found[row])] == found[row])
            repeats = different & (cosines[row] > COPY)
            near += int(repeats.sum())
            if (found[row][repeats] < ids[at]).any():
                continue
            kept = np.flatnonzero(different & ~repeats)[:comparisons]
            drawn.append(int(at))
            others.append([(int(found[row][n]), float(cosines[row][n])) for n in kept])
    return NullPictures(keys[drawn[:sample]], ids[drawn[:sample]], others[:sample], near)


def check_pictures(found: NullPictures, index: Index, fpr: float, num_images: int) -> None:
    """Raise AuditError where so few pictures can promise no such rate."""
    needed = sample_needed(fpr, num_images)
    if len(found) < needed:
        images = f" with {num_images} images a candidate" if num_images > 1 else ""
        raise AuditError(
            f"{index.folder.url}: {len(found):,} different pictures cannot tell a false-positive rate of {fpr:g}"
            f"{images}, {needed:,} are needed: index more pictures, raise --match-fpr, make fewer --num-images, name "
            "captions known to be clean with --clean, or give --ls-threshold"
        )


def pictures_null(found: NullPictures, crops: TrainingCrops, masks: Masks, fpr: float, num_images: int) -> Null:
    """The null of different training pictures, each under one mask drawn from the run, on all cores.

    Of each sampled picture the smallest correlation distance to its nearest others. A candidate has the chances of
    `num_images` of them. Pairs that are near-duplicates by their training crops are left out too. A picture that
    cannot be compared with all of its others is no member: fewer comparisons would make the threshold laxer. Where too
    few are left there is no threshold, and the null says why (`Null.untold`).

    Args:
        found: the pictures.
        crops: descriptors of their crops, with the pictures.
        masks: match masks of the run at latent size, [N, h, w].
        fpr: false-positive rate a candidate.
        num_images: images a candidate.
    """
    references, index = crops.references, crops.references.index
    near = found.near_duplicates
    smallest: list[float] = []

    def compare(place: int, others: list[int]) -> float | None:
        own = references.pixels(int(found.ids[place]))
        if own is None:
            return None
        mask = masks[int(found.keys[place] % np.uint64(len(masks)))]
        image = MaskedImage(own, mask[None])
        pictures = [pixels for id in others if (pixels := references.pixels(id)) is not None]
        if not references.unreadable.keys().isdisjoint(others):
            return None
        return min((float(image.compare(each).correlation_distances[0]) for each in pictures), default=None)

    with Progress(len(found), "pictures", "null") as progress:
        for block in _blocks(len(found)):
            ids = [int(found.ids[place]) for place in block]
            close = [id for place in block for id, cosine in found.others[place] if cosine > NEAR]
            crops.describe([*ids, *close])
            different = []
            for place, id in zip(block, ids, strict=True):
                crop = crops.vector(id)
                vector = index.vectors([id])[0] if crop is None else crop
                # where nothing was cut off, neither is compared by more than the index knows
                new = [n for n, c in found.others[place] if c <= NEAR or crops.larger(vector, n, c) <= COPY]
                near += len(found.others[place]) - len(new)
                different.append(new)
            smallest += [value for value in crops.pool.map(compare, block, different) if value is not None]
            progress.add(len(block))
    return null_of(PICTURES, smallest, fpr, num_images, near, missing=references.unreadable)


def null_of(
    source: str,
    statistics: Sequence[float],
    fpr: float,
    draws: int = 1,
    near_duplicates: int = 0,
    copies: int = 0,
    missing: Mapping[int, str] | None = None,
) -> Null:
    """The null of a sample some of which may be missing: without a threshold where too much of it is.

    Args:
        missing: why a picture could not be read, by id.
    Raises:
        AuditError: too small for the rate though every picture could be read.
    """
    missing = missing or {}
    why = next(iter(missing.values()), "")
    if missing and len(statistics) < sample_needed(fpr, draws):
        return replace(Null.given(-np.inf, fpr), source=source, draws=draws).without(missing, why)
    return Null.of(source, np.array(statistics), fpr, draws, near_duplicates, copies).without(missing, why)


def threads() -> ThreadPoolExecutor:
    """Threads that read and compare pictures: numpy and decoders let go of the interpreter; reading waits for disks."""
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="match")


def _blocks(count: int) -> Iterator[range]:
    for start in range(0, count, _COMPARED):
        yield range(start, min(start + _COMPARED, count))


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of each id."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
