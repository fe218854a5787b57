"""What matching costs beside generation: the null of 1,600 pictures, and a candidate's comparisons.

    python -m tests.benchmarks.bench_match [--pictures N] [--sizes 512 1024]

Pictures are JPEGs drawn at random, read from a folder as a user's are. Wall time is of this machine as busy as it is;
processor time is what the work takes, whoever else is running. A second of generation a candidate is what a large GPU
takes for an image of Stable Diffusion.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from audit.index import Index, IndexConfig, build_index
from audit.run.schema import TRAJECTORY_MASKS
from audit.verdicts.compare import Neighbour, References, match_image
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.null import draw_pictures, pictures_null, threads

COMPARISONS, IMAGES, GENERATION = 11, 16, 1.0


def draw(folder: Path, count: int, size: int) -> None:
    """Smooth random pictures with grain: about as large as JPEGs of photographs."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, (size, size, 1), dtype=np.int16)
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _all(pool: ThreadPoolExecutor, jobs: list[tuple[Any, ...]]) -> None:
    list(pool.map(lambda job: match_image(*job), jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch, threads() as pool:
            folder = Path(scratch, "pictures")
            draw(folder, args.pictures, size)
            build_index(IndexConfig(images=(str(folder),), output=f"{scratch}/index", sscd="testbed"))
            index = Index.open(f"{scratch}/index")
            crops = TrainingCrops(References(index, (size, size)), index.load_descriptor(), pool)
            masks = rng.random((64, size // 8, size // 8)).astype(np.float32) ** 3
            found = draw_pictures(index, COMPARISONS, args.pictures, 0)
            wall, cpu = timed(functools.partial(pictures_null, found, crops, masks, 0.05, 1))
            print(f"{size} x {size}: null of {len(found):,} pictures {wall:.0f} s, {cpu:.0f} s of processor time")
            references, ids = References(index, (size, size)), index.ids()
            images = rng.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
            of = dict.fromkeys(TRAJECTORY_MASKS, masks[0])
            near = [[Neighbour(int(id), 0.1, 0) for id in rng.choice(ids, COMPARISONS)] for _ in images]
            facts = {int(id): dict.fromkeys(("key", "url", "caption")) for id in ids}

            jobs = [(image, 0, of, each, None, references, facts) for image, each in zip(images, near, strict=True)]
            wall, cpu = timed(functools.partial(_all, pool, jobs))
            print(
                f"{size} x {size}: a candidate {1000 * wall / IMAGES:.0f} ms, {1000 * cpu / IMAGES:.0f} ms of "
                f"processor time: {cpu / IMAGES / GENERATION:.1%} of one core beside {GENERATION:g} s of generation"
            )


if __name__ == "__main__":
    main()
