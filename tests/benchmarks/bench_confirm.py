"""How good are the verdicts of `be-audit confirm`? Printed against the testbed's measured truth.

    python -m tests.benchmarks.bench_confirm [--work DIR] [--num-images K] [--local N] [--none N] [--steps N]
                                             [--no-generation] [--quick]

Generates images of every local caption, every global one and N captions the model never saw, once, into --work; then
searches, compares, calibrates and decides by the code that confirm runs, under every match mask, both nulls, several
rates and numbers of images. `--local N` takes N captions of every copied template and none of the others, for machines
with few cores. `--no-generation` uses the images that are there. An image takes 2 s on two quiet CPU cores. The testbed
is small and not Stable Diffusion.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from audit import testbed
from audit.cli.demo import COPIED
from audit.index import Index, IndexConfig, build_index
from audit.run.schema import MASKS, TRAJECTORY_MASKS
from audit.statistics.intervals import share_interval
from audit.statistics.null import CAPTIONS, PICTURES, Null, sample_needed
from audit.verdicts.compare import COPY, Neighbour, References, match_image, statistic_of
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.null import draw_pictures, pictures_null, threads

NEIGHBOURS, BATCH = 10, 16
NUM_IMAGES = (1, 2, 4, 8, 16)
SMALL = 0.25  # share of the picture below which a fixed region is small


@dataclass(frozen=True)
class Caption:
    """A caption of the testbed: what was measured of it, the number of its template (or picture), and the share of the
    picture its fixed region covers."""

    text: str
    group: str
    template: int
    area: float


def captions_of(num_none: int, per_template: int | None = None) -> list[Caption]:
    """Distinct captions: all local and global ones, and the first `num_none` never seen; copied ones first.

    With `per_template` only so many of every copied template, and those never seen.
    """
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    with np.load(testbed.PICTURES.with_name("regions.npz")) as found:
        regions = np.unpackbits(found["regions"], axis=-1).reshape(len(found["clusters"]), -1).mean(1)
        areas = dict(zip(found["clusters"].astype(str).tolist(), regions.tolist(), strict=True))
    captions = []
    for row in table.to_dict("records"):
        copied = "copied" if (row["copy_error"] or 1) < COPIED else "not copied"
        unseen = row["cluster"].startswith("unseen")
        if row["label"] != "none" or unseen:
            group = "never seen" if unseen else f"{row['label']}, {copied}"
            area = areas.get(row["cluster"], 1.0)
            captions.append(Caption(row["TEXT"], group, int(row["cluster"].rsplit("-", 1)[1]), area))
    none = [each for each in captions if each.group == "never seen"][:num_none]
    order = ("local, copied", "never seen", "global, copied", "local, not copied", "global, not copied")
    kept = [each for each in captions if each.group != "never seen"] + none
    if per_template is not None:
        few: dict[int, list[Caption]] = {}
        for each in captions:
            if each.group == "local, copied":
                few.setdefault(each.template, []).append(each)
        kept = [each for of in few.values() for each in of[:per_template]] + none
    return sorted(kept, key=lambda each: order.index(each.group))


def read_images(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(caption, noise) -> image and masks, of every batch in the folder."""
    found = {}
    for path in sorted(folder.glob("[0-9]*.npz")):
        with np.load(path) as batch:
            columns = {name: batch[name] for name in ("images", *TRAJECTORY_MASKS)}
            for at, key in enumerate(zip(batch["captions"].tolist(), batch["noises"].tolist(), strict=True)):
                found[key] = {name: values[at] for name, values in columns.items()}
    return found


def generate(wanted: Sequence[tuple[str, int]], folder: Path, num_noises: int, steps: int) -> None:
    """Trajectories of (caption, noise) pairs, a file a batch."""
    from pipelines import TrajectorySampler, find_model, load

    sampler = TrajectorySampler(
        load(find_model(str(testbed.PIPELINE)), "cpu", "float32"), None, num_noises, steps=steps
    )
    first = max((int(path.stem) for path in folder.glob("[0-9]*.npz")), default=-1) + 1
    for number, start in enumerate(range(0, len(wanted), BATCH), first):
        captions, noises = zip(*wanted[start : start + BATCH], strict=True)
        made = sampler(list(captions), list(noises))
        masks = {name: getattr(made, name) for name in TRAJECTORY_MASKS}
        np.savez(folder / f"{number:04d}.npz", captions=captions, noises=noises, images=made.images, **masks)
        print(f"{min(start + BATCH, len(wanted))} of {len(wanted)} images", flush=True)


def match_all(found: dict[tuple[str, int], dict[str, Any]], index: Index) -> dict[tuple[str, int], dict[str, float]]:
    """Of every image its largest sscd and, by mask, its smallest correlation distance."""
    keys = list(found)
    vectors = index.load_descriptor()([found[key]["images"] for key in keys]).numpy()
    ids, cosines = index.search(vectors, NEIGHBOURS)
    own = index.own([("caption", [caption for caption, _ in keys])])
    references = References(index, found[keys[0]]["images"].shape[:2])
    nothing = dict.fromkeys(("key", "url", "caption"))
    measured = {}
    for at, key in enumerate(keys):
        pairs = zip(ids[at].tolist(), cosines[at].tolist(), strict=True)
        near = [Neighbour(id, cosine, rank) for rank, (id, cosine) in enumerate(pairs)]
        if own[at] is not None and own[at] not in ids[at]:
            near.append(Neighbour(own[at], float(index.vectors([own[at]])[0] @ vectors[at]), -1))
        facts = {each.id: nothing for each in near}
        masks = {name: found[key][name] for name in TRAJECTORY_MASKS}
        matches = match_image(found[key]["images"], key[1], masks, near, own[at], references, facts)
        measured[key] = {word: float(statistic_of(matches, word) or 0) for word in MASKS}
        measured[key]["sscd"] = max(match["sscd"] for match in matches)
    return measured


class Bench:
    """Images that are there, measured; nulls; verdicts."""

    def __init__(self, captions: list[Caption], work: Path) -> None:
        self.captions = captions
        self.images = read_images(work / "images")
        build_index(IndexConfig(images=(str(testbed.PICTURES),), output=str(work / "index"), sscd="testbed"))
        self.index = Index.open(str(work / "index"))
        self.measured = match_all(self.images, self.index)
        unseen = [each.text for each in captions if each.group == "never seen"]
        self.clean = set(unseen[1::2])  # every second one makes the null of captions, the others are judged

    def having(self, num_images: int) -> list[Caption]:
        """Captions with that many images."""
        return [c for c in self.captions if all((c.text, k) in self.measured for k in range(num_images))]

    def judged(self, source: str, num_images: int) -> list[Caption]:
        """Those with that many images that are no part of such a null."""
        return [each for each in self.having(num_images) if source == PICTURES or each.text not in self.clean]

    def statistic(self, caption: str, mask: str, num_images: int) -> float:
        return min(self.measured[caption, k][mask] for k in range(num_images))

    def null(self, source: str, mask: str, fpr: float, num_images: int) -> Null | None:
        """As confirm would make it; None where the rate cannot be had."""
        there = self.having(num_images)
        if source == CAPTIONS:
            clean = [c.text for c in there if c.text in self.clean]
            if len(clean) < sample_needed(fpr, 1):
                return None
            copies = sum(max(self.measured[text, k]["sscd"] for k in range(num_images)) > COPY for text in clean)
            return Null.of(CAPTIONS, np.array([self.statistic(t, mask, num_images) for t in clean]), fpr, copies=copies)
        pictures = draw_pictures(self.index, NEIGHBOURS + 1, max(1000, sample_needed(fpr, num_images)), 0)
        if len(pictures) < sample_needed(fpr, num_images):
            return None
        masks = np.stack([self.images[c.text, 0][MASKS[mask]] for c in there][:256])
        with threads() as pool:
            references = References(self.index, next(iter(self.images.values()))["images"].shape[:2])
            crops = TrainingCrops(references, self.index.load_descriptor(), pool)
            return pictures_null(pictures, crops, masks, fpr, num_images)

    def verdict(self, caption: Caption, mask: str, null: Null, num_images: int) -> str:
        if max(self.measured[caption.text, k]["sscd"] for k in range(num_images)) > COPY:
            return "global"
        return "local" if self.statistic(caption.text, mask, num_images) < null.threshold else "none"

    def table(self, mask: str, null: Null, num_images: int, judged: list[Caption]) -> None:
        """Verdicts by what was measured of the captions."""
        low, high = null.rate
        print(
            f"  threshold {null.threshold:.3f}, {len(null)} {null.source}; true rate {low:.2%} to {high:.2%} (95 %)"
            + (f"; {null.copies} of them global" if null.source == CAPTIONS else "")
        )
        groups: dict[str, list[Caption]] = {}
        for each in judged:
            groups.setdefault(each.group, []).append(each)
            if each.group == "local, copied":
                half = "even" if each.template % 2 == 0 else "odd"
                groups.setdefault(f"  of them {half} templates", []).append(each)
                if each.area < SMALL:
                    groups.setdefault("  of them small regions", []).append(each)
        for name, of in groups.items():
            verdicts = [self.verdict(each, mask, null, num_images) for each in of]
            counts = {verdict: verdicts.count(verdict) for verdict in ("global", "local", "none")}
            flagged = counts["global"] + counts["local"]
            low, high = share_interval(flagged, len(of))
            text = "  ".join(f"{verdict} {count:>3}" for verdict, count in counts.items())
            print(f"  {name:<26} {text}   flagged {flagged / len(of):6.1%} [{low:.1%}, {high:.1%}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-bench-confirm")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--local", type=int, help="captions of every copied template alone")
    parser.add_argument("--none", type=int, default=150)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-generation", action="store_true", help="use the images that are in --work")
    parser.add_argument("--quick", action="store_true", help="a handful of captions and steps: does it run?")
    args = parser.parse_args()
    captions = captions_of(60 if args.quick else args.none, args.local)
    if args.quick:
        captions = [each for n, each in enumerate(captions) if each.group == "never seen" or n % 24 == 0]
    (args.work / "images").mkdir(parents=True, exist_ok=True)
    if not args.no_generation:
        there = read_images(args.work / "images")
        wanted = [(c.text, k) for k in range(args.num_images) for c in captions if (c.text, k) not in there]
        generate(wanted, args.work / "images", max(16, args.num_images), 2 if args.quick else args.steps)
    bench = Bench(captions, args.work)
    for mask, source, fpr in itertools.product(MASKS, (PICTURES, CAPTIONS), (0.05, 0.01)):
        null = bench.null(source, mask, fpr, 1)
        if null is not None:
            print(f"--match-mask {mask} --match-fpr {fpr}, null of {source}, one image")
            bench.table(mask, null, 1, bench.judged(source, 1))
    most = max((k for k in NUM_IMAGES if bench.having(k)), default=0)
    for source, fpr, num_images in itertools.product((PICTURES, CAPTIONS), (0.05, 0.01), NUM_IMAGES):
        # what more images buy, all on the captions that have the most of them
        null = bench.null(source, "energy", fpr, num_images) if num_images <= most else None
        if null is not None:
            print(f"--num-images {num_images} --match-fpr {fpr}, null of {source}: {num_images} x the cost")
            bench.table("energy", null, num_images, bench.judged(source, most))


if __name__ == "__main__":
    main()
