"""The local threshold, without labels: a low quantile of the masked distance between DIFFERENT training pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.index import Index
from audit.statistics.null import Null
from audit.verdicts.compare import COPY, Masks, References, masked_distances

_SPARE = 8  # neighbours asked for beyond k, since near-duplicates are left out


def local_null(
    index: Index, references: References, masks: Masks, k: int, fpr: float, num_images: int, sample: int, seed: int
) -> Null:
    """Calibrate the local threshold on pairs of different training pictures.

    Of a seeded sample of indexed pictures, each under one mask drawn from the run, the smallest masked distance to the
    k nearest other pictures. Near-duplicates (sscd > 0.5) are repeats in the training set, not different pictures:
    such pairs are left out, and of a group of them only the first picture is sampled. So a data set full of repeats
    neither hides its own copies nor moves the threshold.

    Args:
        masks: match masks of the run at pixel size, [N, H, W].
        sample: pictures to use, at most.
    Raises:
        AuditError: fewer than 20 pictures can be compared.
    """
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
    return Null.of(np.array(best[:sample]), fpr, num_images, near)


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of each id."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
