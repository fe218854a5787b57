"""Flat against IVF on random vectors: python -m tests.benchmarks.bench_index [--rows 1000000] [--type IVF2048,SQ8]

Random directions are the worst case for IVF: nothing clusters. Queries are planted copies at cosines 0.9, 0.75 and 0.6.
The search is the index's own: exact cosines of the stored float16 vectors, in a memory-mapped file, decide in both.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from audit.index import ann

DIM, QUERIES, K = 512, 300, 10
COSINES = (0.9, 0.75, 0.6)


def write_vectors(path: Path, rows: int) -> np.ndarray:
    """Seeded random directions, float16 [rows, 512], written block by block."""
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, DIM))
    for start in range(0, rows, ann.BLOCK):
        block = rng.standard_normal((min(ann.BLOCK, rows - start), DIM), np.float32)
        vectors[start : start + ann.BLOCK] = ann.normalised(block)
    vectors.flush()
    del vectors
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--type", action="append", help="FAISS factory strings to compare with Flat")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        vectors = write_vectors(Path(folder) / "vectors.npy", args.rows)
        copied = rng.choice(args.rows, (len(COSINES), QUERIES), replace=False)
        noise = ann.normalised(rng.standard_normal((len(COSINES), QUERIES, DIM)))
        originals = ann.normalised(vectors[copied])
        cosines = np.array(COSINES, np.float32)[:, None, None]
        queries = cosines * originals + np.sqrt(1 - cosines**2) * noise
        print(f"{args.rows} x {DIM} random vectors, {copied.size} queries, k = {K}, {os.cpu_count()} CPU cores")
        print(f"{'type':16s} {'build s':>8s} {'MB':>6s} {'search s':>9s}  found first at cosine 0.9 / 0.75 / 0.6")
        for key in ["Flat", *(args.type or ["IVF2048,SQ8"])]:
            start, index, size = time.perf_counter(), None, 0
            if key != "Flat":
                facts = ann.build(vectors, key, 0, Path(folder) / "index.faiss")
                index = ann.load(str(Path(folder) / "index.faiss"), facts["num_probe"])
                size = (Path(folder) / "index.faiss").stat().st_size >> 20
            built = time.perf_counter() - start
            start = time.perf_counter()
            found = ann.nearest(vectors, queries.reshape(-1, DIM), K, index)[0][:, 0].reshape(copied.shape)
            searched = time.perf_counter() - start
            recall = " / ".join(f"{share:.3f}" for share in (found == copied).mean(1))
            print(f"{key:16s} {built:8.1f} {size:6d} {searched:9.2f}  {recall}", flush=True)
            del index
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory {peak} MB (pages of the memory-mapped vectors, {args.rows * DIM * 2 >> 20} MB, included)")


if __name__ == "__main__":
    main()
