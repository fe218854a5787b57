"""What matching costs: the null of 1,600 pictures, a candidate's comparisons, and whether a GPU waits for it.

    python -m tests.benchmarks.bench_match [--pictures N] [--sizes 512 1024] [--candidates N]

Pictures are JPEGs drawn at random, read from a folder as a user's are. Wall time is of this machine as busy as it is;
processor time is what the work takes, whoever else is running. A second of generation a candidate is what a large GPU
takes for an image of Stable Diffusion. Whether it waits: generation is a stub that sleeps for that second and writes
the image by the real stage; its wall time with the real matching beside it over that without says what matching costs
the GPU, and the shards that are matched when the last image is made say whether matching keeps up.
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
import pyarrow as pa
from PIL import Image

from audit.index import Index, IndexConfig, build_index
from audit.run.schema import TRAJECTORY_MASKS
from audit.run.select import best_rows, with_images
from audit.run.stage import MATCH, TRAJECTORIES, Stage, run_stage
from audit.verdicts.beside import Beside
from audit.verdicts.candidates import ConfirmConfig, TrajectoriesFingerprint
from audit.verdicts.compare import Neighbour, References, match_image
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.match_shard import MatchFingerprint
from audit.verdicts.null import draw_pictures, pictures_null, threads
from tests.fabricate import make_run, png, trajectories_table

COMPARISONS, IMAGES, GENERATION, SHARD = 11, 16, 1.0, 8


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


def generate(stage: Stage, pictures: list[bytes]) -> float:
    """A GPU that takes GENERATION seconds an image and no processor. Seconds of wall time."""
    started = time.perf_counter()
    for shard in stage.missing():
        items = stage.rows(shard)
        time.sleep(GENERATION * items.num_rows)
        made = [pictures[at % len(pictures)] for at in range(items.num_rows)]
        stage.ledger.commit(shard, trajectories_table(items, made), {"ok": len(made)}, {"wall": 0.0})
    return time.perf_counter() - started


def beside(folder: Path, index: str, size: int, candidates: int) -> tuple[float, float, int, float]:
    """Generation of some candidates alone, and with matching beside it.

    Returns:
        Seconds alone, seconds with matching, shards matched of all when generation ended, seconds for the rest.
    """
    rng = np.random.default_rng(2)
    pictures = [png(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(SHARD)]
    run = make_run(folder, [f"caption {number}" for number in range(candidates)])
    chosen = best_rows(run, "ld_energy", top_k=candidates)
    shards = pa.array(np.arange(candidates) // SHARD, pa.int32())
    captions = chosen.append_column("shard", shards).append_column("clean", pa.array(np.zeros(candidates, bool)))
    config = ConfirmConfig(run.url, index=index)
    asked = TrajectoriesFingerprint("ld_energy", captions.num_rows, "", None, 1)
    alone = generate(Stage.begin(run, TRAJECTORIES, asked, with_images(captions, 1), config), pictures)
    Stage.open(run, TRAJECTORIES).discard()
    trajectories = Stage.begin(run, TRAJECTORIES, asked, with_images(captions, 1), config)
    opened = Index.open(index)
    matched_by = MatchFingerprint(trajectories.facts.digest, opened.contents, "", config.neighbours)
    matching = Stage.begin(run, MATCH, matched_by, captions, config)
    with Beside(matching, trajectories, config, None):
        together = generate(trajectories, pictures)
        matched = len(matching.done())
    started = time.perf_counter()
    run_stage(matching, matching.missing(), config, None)
    assert matching.complete
    return alone, together, matched, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--candidates", type=int, default=40, help="generated by a stub with matching beside; 0: none")
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
            if args.candidates:
                alone, both, matched, rest = beside(Path(scratch, "run"), f"{scratch}/index", size, args.candidates)
                shards = -(-args.candidates // SHARD)
                print(
                    f"{size} x {size}: {args.candidates} candidates generated in {alone:.1f} s alone, in {both:.1f} s "
                    f"with matching beside: {both / alone:.3f} times; {matched} of {shards} shards "
                    f"were matched by then, the rest took {rest:.1f} s"
                )


if __name__ == "__main__":
    main()
