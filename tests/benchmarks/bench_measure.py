"""Which measure tells a copied region best? Chosen on one half of the testbed's templates, reported on the other.

    python -m tests.benchmarks.bench_measure --work DIR [--other DIR]

Reads the images that bench_confirm left in --work, and those of other noises in --other. Templates with an odd number,
the first noise and every second caption never seen choose; even templates and the other captions report, once under
the first noise and once under all others of --other.
Measures times masks, and SSCD of what lies under a mask (the square around the cells above a part of its largest, cut
out of image and picture alike) and of the whole picture; of each the AUC, and what is flagged at `--match-fpr` 0.05 and
0.01 under the null of pictures.

The testbed copies few small regions, so there is a second set: of each large template only a part of 7 to 25 % of the
picture is kept, in the training pictures (the rest becomes another picture's) and in the images and energy maps (the
rest is that of an image of a caption never seen; the energy of the part is made 2.5 to 12 times weaker, as the small
templates have it). The testbed is small and not Stable Diffusion.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from audit import testbed
from audit.index import Index, IndexConfig, build_index
from audit.statistics.intervals import cluster_bootstrap, share_interval
from audit.statistics.metrics import auc
from audit.statistics.null import PICTURES, Null
from audit.verdicts.compare import COPY, PLAIN, References, encode_reference, masks_at
from audit.verdicts.null import draw_pictures
from tests.benchmarks.bench_confirm import NEIGHBOURS, SMALL, Caption, captions_of, read_images

Array = NDArray[Any]
Images = dict[tuple[str, int], dict[str, Any]]
PICTURES_OF_NULL = 400


def masks_of(found: dict[str, Any], size: tuple[int, int]) -> dict[str, Array]:
    """Weights at pixel size, [H, W], by name."""
    maps = (masks_at(found[name][None], size)[0] for name in ("energy_mask", "score_map", "be_mask"))
    energy, score, attention = (each / each.max() for each in maps)
    masks = {f"energy ^ {power:g}": energy**power for power in (1, 2, 3, 4)}
    masks |= {f"energy > {part:g} max": energy > part for part in (0.25, 0.5)}
    masks |= {"energy > mean": energy > energy.mean(), "energy x score map": energy * score}
    masks |= {"score map ^ 2": score**2, "BE ^ 2": attention**2, "whole": np.ones(size)}
    return {name: np.asarray(each, np.float32) for name, each in masks.items()}


def measured(image: Array, pictures: Array, weights: Array) -> dict[str, Array]:
    """Distances of one image to N pictures under M weights, [N, M] by name; 0 the same.

    Args:
        image: [3, P] in [0, 1]. pictures: [N, 3, P]. weights: [M, P].
    """
    w = (weights / weights.sum(1, keepdims=True)).T
    x, y = image @ w, pictures @ w  # means under the weights: [3, M], [N, 3, M]
    vx, vy = ((image**2) @ w - x**2).sum(0), ((pictures**2) @ w - y**2).sum(1)
    both = ((image * pictures) @ w - x * y).sum(1)
    shift = np.square(x - y).sum(1)
    distance = np.maximum(vx + vy - 2 * both + shift, 0)
    flat = (vx < 1e-5) | (vy < 1e-5)
    return {
        "distance": np.sqrt(distance),
        "distance, colour offset left out": np.sqrt(np.maximum(distance - shift, 0)),
        "distance / contrast": np.sqrt(distance / (vx + PLAIN)),
        "correlation": 1 - np.where(flat, 0, both / np.sqrt(np.maximum(vx * vy, 1e-12))),
        "structure (as SSIM)": 1 - 2 * both / (vx + vy + PLAIN),
        "concordance": 1 - 2 * both / (vx + vy + shift + PLAIN),
    }


@dataclass
class Half:
    """Images of one half: which are copied, their template, largest sscd, and statistics by measure and mask."""

    copied: NDArray[np.bool_]
    small: NDArray[np.bool_]
    templates: NDArray[np.object_]
    sscd: Array
    statistics: dict[tuple[str, str], Array]
    null: dict[tuple[str, str], Array]

    def flagged(self, name: tuple[str, str], fpr: float) -> NDArray[np.bool_]:
        """By the measure alone."""
        return self.statistics[name] < Null.of(PICTURES, self.null[name], fpr).threshold


def parts(seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """Of each large template a box or an ellipse of 7 to 25 % of the picture, all in its fixed region: [64, 64]."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:64, 0:64] / 64
    with np.load(testbed.PICTURES.with_name("regions.npz")) as found:
        regions = np.unpackbits(found["regions"], axis=-1).reshape(-1, 64, 64).astype(bool)
        names = found["clusters"].astype(str).tolist()
    kept = {}
    for name, region in zip(names, regions, strict=True):
        while region.mean() > SMALL and name not in kept:
            (w, h), (x, y) = rng.uniform(0.25, 0.6, 2), rng.uniform(0, 0.75, 2)
            box = (u >= x) & (u < x + w) & (v >= y) & (v < y + h)
            ellipse = ((u - x) / w - 0.5) ** 2 + ((v - y) / h - 0.5) ** 2 < 0.25
            part = box if rng.random() < 0.5 else ellipse
            if 0.07 < part.mean() < SMALL and (part & region).sum() > 0.97 * part.sum():
                kept[name] = part & region
    return kept


def cut_pictures(file: Path, kept: dict[str, NDArray[np.bool_]]) -> None:
    """The testbed's training pictures with small fixed regions."""
    rng = np.random.default_rng(1)
    rows = pq.read_table(testbed.PICTURES).to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    others = [at for at, row in enumerate(rows) if not row["cluster"].startswith(("template", "global"))]
    for row, image in zip(rows, pixels, strict=True):
        if row["cluster"] in kept:
            made = np.where(kept[row["cluster"]][..., None], image, pixels[rng.choice(others)])
            row["image"] = {"bytes": encode_reference(made), "path": None}
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def cut_images(images: Images, captions: dict[str, Caption], kept: dict[str, NDArray[np.bool_]]) -> Images:
    """The images with small copied regions; those of small templates and of captions never seen as they are."""
    rng = np.random.default_rng(2)
    unseen = [key for key in images if captions[key[0]].group == "never seen"]
    made: Images = {}
    for key, found in images.items():
        part = kept.get(f"template-{captions[key[0]].template:03d}")
        if captions[key[0]].group == "never seen" or part is None:
            made[key] = found
            continue
        other, weaker = images[unseen[rng.integers(len(unseen))]], np.exp(rng.uniform(np.log(0.08), np.log(0.4)))
        side = 64 // len(found["energy_mask"])
        share = part.reshape(64 // side, side, 64 // side, side).mean((1, 3))
        maps = {name: share * weaker * found[name] + (1 - share) * other[name] for name in ("energy_mask", "score_map")}
        image = np.where(part[..., None], found["images"], other["images"])
        made[key] = {"images": image, **maps, "be_mask": other["be_mask"]}
    return made


class Bench:
    """Training pictures, and statistics of images against their nearest."""

    def __init__(self, pictures: Path, index: Path) -> None:
        build_index(IndexConfig(images=(str(pictures),), output=str(index), sscd="testbed"))
        self.index = Index.open(str(index))
        self.descriptor = self.index.load_descriptor()
        self.references = References(self.index, (64, 64))
        self.drawn = draw_pictures(self.index, NEIGHBOURS + 1, PICTURES_OF_NULL, 0)

    def half(self, images: Images, captions: dict[str, Caption]) -> Half:
        """What is found on these images; their masks make the null."""
        keys = list(images)
        vectors = self.descriptor([images[key]["images"] for key in keys]).numpy()
        ids, cosines = self.index.search(vectors, NEIGHBOURS)
        own = self.index.own([("caption", [caption for caption, _ in keys])])
        sscd = cosines.max(1)
        masks = [masks_of(images[key], (64, 64)) for key in keys]
        found: dict[tuple[str, str], list[float]] = {}
        for at, key in enumerate(keys):
            near = [int(id) for id in ids[at]]
            if own[at] is not None and own[at] not in near:
                near.append(own[at])
                sscd[at] = max(sscd[at], float(self.index.vectors([own[at]])[0] @ vectors[at]))
            self._add(found, images[key]["images"], near, masks[at])
            found.setdefault(SSCD_WHOLE, []).append(1 - float(sscd[at]))
        null: dict[tuple[str, str], list[float]] = {}
        for key, id, others in zip(self.drawn.keys, self.drawn.ids, self.drawn.others, strict=True):
            mask = masks[int(key % np.uint64(len(masks)))]
            self._add(null, self.references.pixels(int(id)), [other for other, _ in others], mask)
            whole = self.index.vectors([int(id), *(other for other, _ in others)])
            null.setdefault(SSCD_WHOLE, []).append(1 - float((whole[1:] @ whole[0]).max()))
        of = [captions[caption] for caption, _ in keys]
        copied = np.array([each.group == "local, copied" for each in of])
        small = copied & np.array([each.area < SMALL for each in of])
        # captions never seen have no template: each is a cluster of its own
        templates = np.array([f"t{e.template}" if c else e.text for e, c in zip(of, copied, strict=True)], object)
        arrays = ({name: np.array(values) for name, values in each.items()} for each in (found, null))
        return Half(copied, small, templates, sscd.astype(float), *arrays)

    def _add(
        self, to: dict[tuple[str, str], list[float]], image: Any, near: list[int], masks: dict[str, Array]
    ) -> None:
        pictures = np.stack([_planes(self.references.pixels(id)) for id in near])
        weights = np.stack([each.ravel() for each in masks.values()])
        for measure, values in measured(_planes(image), pictures, weights).items():
            for mask, smallest in zip(masks, values.min(0).tolist(), strict=True):
                to.setdefault((measure, mask), []).append(smallest)
            several = values[:, [list(masks).index(name) for name in SEVERAL]]
            to.setdefault((measure, "best of " + ", ".join(SEVERAL)), []).append(float(several.min()))
        for name in CUT_OUT:
            rows, columns = square_around(masks[name] > 0)
            cut = [each[rows, columns] for each in (np.asarray(image), *(self.references.pixels(id) for id in near))]
            vectors = self.descriptor(cut).numpy()
            to.setdefault(("1 - SSCD, cut out", name), []).append(1 - float((vectors[1:] @ vectors[0]).max()))


def square_around(cells: Array) -> tuple[slice, slice]:
    """The square of at least a quarter of the side that holds all marked pixels, [H, W], with two more at its edges."""
    side, spans = len(cells), [np.flatnonzero(cells.any(axis)) for axis in (1, 0)]
    length = min(side, max(side // 4, *(int(span[-1] - span[0]) + 5 for span in spans)))
    starts = [int(np.clip((span[0] + span[-1] + 1 - length) // 2, 0, side - length)) for span in spans]
    return slice(starts[0], starts[0] + length), slice(starts[1], starts[1] + length)


SSCD_WHOLE = ("1 - SSCD, under the null", "whole")
CUT_OUT = ("energy > 0.25 max", "energy > 0.5 max")
SEVERAL = ("energy ^ 1", "energy ^ 4", "energy > 0.25 max")


def _planes(pixels: Any) -> Array:
    return np.asarray(pixels, np.float32).transpose(2, 0, 1).reshape(3, -1) / 255


def line(half: Half, name: tuple[str, str], intervals: bool) -> str:
    """One measure on one half."""
    values = -half.statistics[name]
    text = f"{name[0]:<34} {name[1]:<50} AUC {auc(values, half.copied):.3f}"
    if intervals:
        low, high = cluster_bootstrap(auc, values, half.copied, half.templates)
        text += f" [{low:.3f}, {high:.3f}]"
    for fpr in (0.05, 0.01):
        flagged = half.flagged(name, fpr)
        parts: list[tuple[str, NDArray[np.bool_]]] = [("copied", half.copied), ("small", half.small)]
        text += f" | {fpr:g}:"
        for word, rows in (*parts, ("never seen", ~half.copied)):
            either = (flagged | (half.sscd > COPY))[rows]
            low, high = share_interval(int(either.sum()), len(either)) if len(either) else (0.0, 1.0)
            text += f" {word} {either.sum()} of {len(either)}" + (f" [{low:.1%}, {high:.1%}]" if intervals else "")
        text += f", copied by the measure alone {flagged[half.copied].sum()}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-bench-confirm")
    parser.add_argument("--other", type=Path, help="a second --work of bench_confirm, with several images a caption")
    parser.add_argument("--shown", type=int, default=12, help="best ones of the choosing half that are printed")
    args = parser.parse_args()
    captions = {each.text: each for each in captions_of(10_000) if each.group in ("local, copied", "never seen")}
    images = {key: found for key, found in read_images(args.work / "images").items() if key[0] in captions}
    unseen = [text for text, each in captions.items() if each.group == "never seen"]
    odd = {text for text, each in captions.items() if each.template % 2 and each.group != "never seen"}
    choosing = odd | set(unseen[::2])
    kept = parts()
    cut_pictures(args.work / "cut" / "pictures.parquet", kept)
    first = {key: found for key, found in images.items() if key[1] == 0}
    samples = {
        "choosing half": {key: found for key, found in first.items() if key[0] in choosing},
        "reporting half": {key: found for key, found in first.items() if key[0] not in choosing},
    }
    if args.other is not None:
        more = read_images(args.other / "images")
        samples["reporting half, other noises"] = {
            key: found for key, found in more.items() if key[0] in captions and key[0] not in choosing and key[1] > 0
        }
    benches = {
        "as they are": Bench(testbed.PICTURES, args.work / "index"),
        "cut down": Bench(args.work / "cut" / "pictures.parquet", args.work / "cut" / "index"),
    }
    halves: dict[tuple[str, str], Half] = {}
    for (words, sample), (regions, bench) in itertools.product(samples.items(), benches.items()):
        made = cut_images(sample, captions, kept) if regions == "cut down" else sample
        halves[words, regions] = bench.half(made, captions)
    of_choosing = [half for (words, _), half in halves.items() if words == "choosing half"]
    ranked = sorted(of_choosing[0].statistics, key=lambda name: -sum(worth(half, name) for half in of_choosing))
    shown = ranked[: args.shown] + [name for name in SHIPPED if name not in ranked[: args.shown]]
    for (words, regions), half in halves.items():
        print(f"\n{words}, regions {regions}: {half.copied.sum()} copied, {(~half.copied).sum()} never seen")
        low, high = cluster_bootstrap(auc, half.sscd, half.copied, half.templates)
        print(f"SSCD alone: AUC {auc(half.sscd, half.copied):.3f} [{low:.3f}, {high:.3f}]")
        for name in shown:
            print(line(half, name, words != "choosing half"))


def worth(half: Half, name: tuple[str, str]) -> float:
    """What a measure is chosen by: the mean share of copied ones that are flagged at 0.05 and at 0.01."""
    either = [(half.flagged(name, fpr) | (half.sscd > COPY))[half.copied].mean() for fpr in (0.05, 0.01)]
    return float(np.mean(either))


SHIPPED = (
    SSCD_WHOLE,
    *(("1 - SSCD, cut out", name) for name in CUT_OUT),
    ("concordance", "energy ^ 3"),
    ("correlation", "energy ^ 2"),
    ("distance", "energy ^ 2"),
    ("distance", "score map ^ 2"),
    ("distance", "BE ^ 2"),
    ("distance", "whole"),
)


if __name__ == "__main__":
    main()
