"""Copies of photographs by the real SSCD: against the whole picture, against the training crop, against the larger.

    python -m tests.benchmarks.bench_photographs [--sscd FILE]

A model that reproduces a training picture reproduces its centre crop. 20 photographs (scikit-image's) and 20 drawn
pictures, each cut to three shapes, are cropped as training does and then changed in nine ways (cropped, recoloured,
resized, ...): 1,080 cases. Found: cosine above 0.5 with its own picture; falsely found: with any picture of another.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from PIL import Image

from audit.index.descriptors import find_descriptor, open_descriptor
from audit.statistics.intervals import share_interval
from audit.verdicts.compare import COPY, as_trained
from tests.photographs import CHANGES, photographs

SHAPES = {"4:3": 4 / 3, "3:2": 3 / 2, "2:1": 2.0}
SIZE = 512


def drawn(count: int) -> dict[str, Image.Image]:
    """Pictures of many overlapping ellipses, each of its own colours."""
    from PIL import ImageDraw

    found = {}
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = Image.new("RGB", (1024, 768), tuple(rng.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        for _ in range(40):
            x, y, width, height = rng.integers((0, 0, 20, 20), (1000, 740, 400, 300)).tolist()
            draw.ellipse((x, y, x + width, y + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
        found[f"drawn {number}"] = picture
    return found


def cut(picture: Image.Image, ratio: float) -> Image.Image:
    """The largest centred part of that shape, wide."""
    width = min(picture.width, round(picture.height * ratio))
    height = min(picture.height, round(width / ratio))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sscd")
    path = find_descriptor(parser.parse_args().sscd)
    descriptor = open_descriptor(path, "cpu")
    pictures = photographs() | drawn(20)
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {"none": lambda image: image, **CHANGES}
    print(f"{path.name}, {descriptor.preprocessing['resize']}: {len(pictures) * len(SHAPES) * len(changes):,} cases")
    print(f"{'':<12} {'shape':<5} {'against':<8} {'median':>7} {'lowest':>7}   found                    falsely found")
    kinds = {"photographs": slice(0, 20), "drawn": slice(20, None)}  # a drawn picture is like other drawn ones
    totals = {(kind, name): np.zeros(4, int) for kind in kinds for name in ("whole", "crop", "larger")}
    for shape, ratio in SHAPES.items():
        originals = [cut(picture, ratio) for picture in pictures.values()]
        crops = [Image.fromarray(as_trained(picture, (SIZE, SIZE))) for picture in originals]
        whole, crop = descriptor(originals).numpy(), descriptor(crops).numpy()
        copies = np.stack([descriptor([change(each) for each in crops]).numpy() for change in changes.values()])
        against = {"whole": copies @ whole.T, "crop": copies @ crop.T}
        against["larger"] = np.maximum(against["whole"], against["crop"])
        for (kind, part), (name, cosines) in itertools.product(kinds.items(), against.items()):
            own = np.einsum("cnn->cn", cosines)[:, part]
            others = np.where(np.eye(len(originals), dtype=bool), -1, cosines).max(-1)[:, part]
            counts = np.array([(own > COPY).sum(), own.size, (others > COPY).sum(), others.size])
            totals[kind, name] += counts
            figures = f"{np.median(own):>7.3f} {own.min():>7.3f}   {_shares(counts)}"
            print(f"{kind:<12} {shape:<5} {name:<8} {figures}", flush=True)
    for (kind, name), counts in totals.items():
        print(f"{kind:<12} {'all':<5} {name:<8} {'':>7} {'':>7}   {_shares(counts)}")


def _shares(counts: np.ndarray) -> str:
    texts = []
    for count, total in ((counts[0], counts[1]), (counts[2], counts[3])):
        low, high = share_interval(int(count), int(total))
        texts.append(f"{count / total:6.1%} [{low:.1%}, {high:.1%}]".ljust(24))
    return " ".join(texts)


if __name__ == "__main__":
    main()
