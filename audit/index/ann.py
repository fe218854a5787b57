"""Nearest neighbours: FAISS proposes, exact cosines of the stored vectors decide.

FAISS holds positions in `vectors.npy`, whatever its type; ids are looked up beside (`ids.npy`), so no index type can
lose or renumber them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from audit.base.errors import AuditError

BLOCK = 65536  # vectors turned to float32 at once: 128 MB at 512 dimensions
FLAT_LIMIT, SQ_LIMIT = 1_000_000, 10_000_000


def auto_key(count: int) -> str:
    """FAISS factory string for a number of vectors: exact; IVF with 8-bit scalars; IVF by HNSW with product codes."""
    if count <= FLAT_LIMIT:
        return "Flat"
    lists = 1 << int(np.ceil(np.log2(4 * np.sqrt(count))))
    return f"IVF{lists},SQ8" if count <= SQ_LIMIT else f"OPQ64_256,IVF{lists}_HNSW32,PQ64"


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def training_size(key: str, count: int) -> int:
    """64 vectors a list where a million vectors allow it, never under FAISS's minimum of 39, nor under 16,384."""
    found = re.search(r"IVF(\d+)", key)
    lists = int(found[1]) if found else 256
    return min(count, max(16_384, 39 * lists, min(64 * lists, 1_000_000)))


def make(key: str, dim: int) -> Any:
    """An empty FAISS index. Raises AuditError for a factory string FAISS does not know."""
    import faiss

    try:
        return faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise AuditError(f"--type {key}: FAISS does not know this for {dim} dimensions: {_reason(error)}") from error


def build(vectors: np.ndarray, key: str, seed: int, path: Path) -> dict[str, Any]:
    """Train on a seeded random sample, add everything in blocks, write to `path`.

    Args:
        vectors: float16 [N, D], memory-mapped.
        key: any FAISS factory string.
    Returns:
        training_rows, num_lists, num_probe (None without lists).
    Raises:
        AuditError: a factory string FAISS does not know, or too few vectors for it.
    """
    import faiss

    count, dim = vectors.shape
    index = make(key, dim)
    sample = sample_positions(count, training_size(key, count), seed)
    try:
        index.train(normalised(vectors[sample]))
        for start in range(0, count, BLOCK):
            index.add(normalised(vectors[start : start + BLOCK]))
    except RuntimeError as error:
        raise AuditError(f"--type {key}: cannot be trained on {len(sample)} vectors: {_reason(error)}") from error
    facts: dict[str, Any] = {"training_rows": len(sample), "num_lists": None, "num_probe": None}
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        # a sixteenth of the lists: the copies at cosine 0.75 are found, see tests/benchmarks/bench_index.py
        ivf.nprobe = max(min(ivf.nlist, 16), ivf.nlist // 16)
        facts.update(num_lists=ivf.nlist, num_probe=ivf.nprobe)
    faiss.write_index(index, str(path))
    return facts


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].rsplit("Error: ", 1)[-1]


def load(path: str, num_probe: int | None) -> Any:
    """An index file, memory-mapped where FAISS can."""
    import faiss

    index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and num_probe:
        ivf.nprobe = num_probe
    return index


def sample_positions(count: int, size: int, seed: int) -> np.ndarray:
    """Seeded positions without replacement, ascending (reads go forward through the file)."""
    return np.sort(np.random.default_rng(seed).choice(count, size=min(size, count), replace=False))


def nearest(
    vectors: np.ndarray, queries: np.ndarray, k: int, index: Any | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest by exact cosine.

    Args:
        vectors: float16 [N, D] (memory-mapped); unit length up to rounding.
        queries: [Q, D].
        k: neighbours; rows are padded where there are fewer.
        index: FAISS index over the positions of `vectors`, asked for more than k; None searches everything.
    Returns:
        positions int64 [Q, k] (-1 for none) and cosines float32 [Q, k] (-inf), best first, ties by position.
    """
    queries = normalised(queries)
    wide = min(len(vectors), max(4 * k, k + 64))
    found = np.full((len(queries), k), -1, np.int64)
    cosines = np.full((len(queries), k), -np.inf, np.float32)
    proposed = index.search(queries, wide)[1] if index is not None else _scan(vectors, queries, wide)
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        positions = proposed[rows]
        near = normalised(vectors[np.maximum(positions, 0)])
        scores = np.where(positions >= 0, np.einsum("qd,qkd->qk", queries[rows], near), -np.inf).astype(np.float32)
        order = np.lexsort((positions, -scores))[:, :k]
        width = order.shape[1]
        found[rows, :width] = np.take_along_axis(positions, order, 1)
        cosines[rows, :width] = np.take_along_axis(scores, order, 1)
    return found, cosines


def _scan(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Positions [Q, k] of the largest inner products over all vectors, a block at a time."""
    import faiss

    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(vectors), BLOCK):
        block = normalised(vectors[start : start + BLOCK])
        scores, positions = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, positions + start)
    heap.finalize()
    return heap.I


def recall(vectors: np.ndarray, index: Any | None, seed: int, size: int = 256, trained: int = 0) -> dict[str, Any]:
    """Recall of an index against exact search, on a seeded sample of vectors, held out from training if any are.

    `recall_at_1`, `recall_at_10`: of the sample's exact neighbours other than itself, the share found.
    `copy_recall_at_1`: of the sample's copies, changed to a cosine of 0.75 by noise, the share for which the index
    finds a picture as near as exact search does. What is as near as the last exact one counts as found: ties do not
    matter.
    """
    count = len(vectors)
    rng = np.random.default_rng(seed + 1)
    pool = np.arange(count)
    if trained < count:
        pool = np.setdiff1d(pool, sample_positions(count, trained, seed))
    positions = np.sort(rng.choice(pool, size=min(size, len(pool)), replace=False))
    queries = normalised(vectors[positions])
    noise = rng.standard_normal(queries.shape).astype(np.float32)
    noise -= np.sum(noise * queries, axis=1, keepdims=True) * queries
    copies = 0.75 * queries + np.sqrt(1 - 0.75**2).astype(np.float32) * normalised(noise)

    def without_self(search: Any | None) -> np.ndarray:
        found, cosines = nearest(vectors, queries, min(11, count), search)
        cosines[found == positions[:, None]] = -np.inf
        return -np.sort(-cosines, axis=1)[:, :10]

    exact, got = without_self(None), without_self(index)
    first_exact, first_got = (nearest(vectors, copies, 1, search)[1][:, 0] for search in (None, index))
    k = min(10, count - 1)
    if k < 1:
        return {"recall_at_1": 1.0, "recall_at_10": 1.0, "copy_recall_at_1": 1.0, "recall_rows": len(positions)}
    close = exact[:, k - 1 : k] - 1e-5
    return {
        "recall_at_1": round(float((got[:, 0] >= exact[:, 0] - 1e-5).mean()), 4),
        "recall_at_10": round(float(((got >= close) & np.isfinite(got)).sum(1).clip(max=k).mean() / k), 4),
        "copy_recall_at_1": round(float((first_got >= first_exact - 1e-5).mean()), 4),
        "recall_rows": len(positions),
    }
