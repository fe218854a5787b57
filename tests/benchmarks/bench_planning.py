"""Peak memory and time of planning: it must not grow with the rows beyond the 64-bit hash of each.

    python tests/benchmarks/bench_planning.py [ROWS ...]

Each size is planned in a process of its own; its peak is what the kernel reports (ru_maxrss). Blocks of a fixed size
(about 30 MiB) fill up between 100 thousand and 1 million rows; after that only the hashes grow.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audit import captions
from audit.base.storage import Folder

ROWS_PER_GROUP = 1_000_000  # few, large row groups: the hard case
DISTINCT = 0.8


def write_captions(path: Path, rows: int) -> None:
    """A LAION-like list with repeated captions and a URL column."""
    rng = np.random.default_rng(0)
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, rows, ROWS_PER_GROUP):
            numbers = rng.integers(0, int(rows * DISTINCT), min(ROWS_PER_GROUP, rows - start)).astype("U")
            texts = np.char.add("a photograph of item number ", numbers)
            urls = np.char.add("https://images.example.com/", numbers)
            writer.write_table(pa.table([urls, texts], schema=schema), row_group_size=ROWS_PER_GROUP)


def plan(path: Path, folder: str) -> dict[str, float]:
    """Plan and save; the figures of this process."""
    start = time.perf_counter()
    made = captions.plan_captions(
        [str(path)], caption_col=None, keep_cols=None, limit=None, rows_per_shard=4096, staging=Folder(folder)
    )
    planned = time.perf_counter()
    made.save(Folder(folder))
    return {
        "rows": made.num_rows,
        "unique": made.num_unique,
        "plan_s": planned - start,
        "save_s": time.perf_counter() - planned,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def measure(rows: int) -> dict[str, float]:
    """Write and plan so many rows, each in a fresh process: a child's peak starts at its parent's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "captions.parquet")
        _alone(write_captions, path, rows)
        return _alone(plan, path, f"{folder}/run")


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(sizes: list[int]) -> None:
    """Print a line a size; the growth is against the line above."""
    print(
        f"{'rows':>12} {'unique':>12} {'plan s':>8} {'save s':>8} {'hashes MiB':>11} {'peak MiB':>9} "
        f"{'bytes more a row':>17} {'beyond the hash':>16}"
    )
    before: dict[str, float] = {}
    for rows in sizes:
        found = measure(rows)
        line = (
            f"{found['rows']:>12,} {found['unique']:>12,} {found['plan_s']:>8.2f} {found['save_s']:>8.2f} "
            f"{8 * rows / 2**20:>11.1f} {found['peak_bytes'] / 2**20:>9.1f}"
        )
        if before and rows != before["rows"]:
            grown = (found["peak_bytes"] - before["peak_bytes"]) / (rows - before["rows"])
            line += f" {grown:>17.2f} {grown - 8:>16.2f}"
        print(line, flush=True)
        before = found


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [100_000, 1_000_000, 10_000_000])
