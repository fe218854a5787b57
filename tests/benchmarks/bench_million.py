"""A scan of a million rows whose scorer takes no time: what everything around the model costs, and that it stays so.

    python -m tests.benchmarks.bench_million [--rows 1000000]

Planned, read, written and committed as ever, by the real scan, in a process of its own; the scorer alone is another:
it returns numbers at once. Rows a second and resident memory of the first and the last tenth must be alike. Then what
the run takes on disk, and what reading it takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from audit.reports.report import ReportConfig, report
from audit.reports.sql import run_query
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.schema import DETECTORS
from audit.run.select import best_rows
from audit.run.stage import SCAN, Stage
from audit.run.status import run_status
from audit.run.verify import verify_run
from audit.scores import scan_shard
from audit.scores.scan import ScanConfig, ScanSummary, scan
from tests.benchmarks.bench_planning import write_captions

SIDE = 16  # of the testbed's masks
MEMORY_EVERY = 0.5  # seconds between two looks at the memory


class InstantScorer:
    """In the place of what `open_scorer` gives: the same columns, made up."""

    def __init__(self, *_: Any) -> None: ...

    def expect(self, captions: list[str]) -> None: ...

    def __call__(self, captions: list[str], on_batch: Callable[[int], None]) -> dict[str, np.ndarray]:
        count = len(captions)
        numbers = np.linspace(1, 2, count, dtype=np.float32)
        on_batch(count)
        masks = np.broadcast_to(numbers[:, None, None], (count, SIDE, SIDE))
        return {
            **{name: numbers for name in DETECTORS if name != "anisotropy"},
            "ld_std": numbers,
            "mask": masks,
            "energy_mask": masks,
            "num_tokens": np.full(count, 9, np.int32),
            "truncated": np.zeros(count, bool),
        }


def scanned(captions: str, run: str) -> tuple[ScanSummary, list[tuple[float, int]], int]:
    """Scan with the instant scorer: the summary, resident memory by time, and the peak in bytes."""
    scan_shard.open_scorer = InstantScorer  # type: ignore[assignment]
    memory: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(MEMORY_EVERY):
            memory.append((time.time(), psutil.Process().memory_info().rss))

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = ScanConfig((captions,), run, model="testbed", device="cpu", self_check=False, second_look=0)
    try:
        found = scan(config)
    finally:
        over.set()
        watcher.join()
    return found, memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a fresh process, whose peak is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def sizes(run: Path) -> dict[str, tuple[int, int]]:
    """Files and bytes by the name of what lies in a run folder."""
    found: dict[str, tuple[int, int]] = {}
    for path in run.rglob("*"):
        if path.is_file():
            name = path.relative_to(run).parts[0]
            files, size = found.get(name, (0, 0))
            found[name] = files + 1, size + path.stat().st_size
    return dict(sorted(found.items()))


READERS: dict[str, Callable[[str], object]] = {
    "nothing, for comparison": Run.open,
    "status": run_status,
    "read_scores of one column": lambda run: read_scores(Run.open(run), ["magnitude"]),
    "sql histogram": lambda run: run_query("histogram", run),
    "sql histogram --memory 1GB": lambda run: run_query("histogram", run, "1GB"),
    "the best thousand": lambda run: best_rows(Run.open(run), "ld_energy", top_k=1000),
    "the best tenth, as for a second look": lambda run: best_rows(Run.open(run), "ld_energy", fraction=0.1),
    "verify": verify_run,
    "report of 1,000, no HTML": lambda run: report(ReportConfig(run, top_k=1000, format=("jsonl",))),
}


def read(name: str, run: str) -> tuple[float, int]:
    """Seconds that one of READERS takes, and the peak of this process in bytes."""
    started = time.monotonic()
    READERS[name](run)
    return time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Scan, print; take the last shard's commit back, and go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        captions, url = f"{folder}/captions.parquet", f"{folder}/run"
        alone(write_captions, Path(captions), rows)
        found, memory, peak = alone(scanned, captions, url)
        assert found.exit_code == 0 and sum(found.counts.values()) == rows, found
        ledger = Stage.open(Run.open(url), SCAN).ledger
        times = [Path(folder, "run", ledger.name(shard)).stat().st_mtime for shard in range(found.shards)]
        print(f"{rows:,} rows in {found.shards} shards, {found.seconds:.0f} s with planning; peak {peak >> 20:,} MiB")
        tenth = max(found.shards // 10, 1)
        for name, first, last in (("first", 0, tenth), ("last", found.shards - 1 - tenth, found.shards - 1)):
            done = rows * (last - first) / found.shards
            resident = max((size for at, size in memory if times[first] <= at <= times[last]), default=0)
            rate = done / max(times[last] - times[first], 1e-9)
            print(f"{name} tenth: {rate:>10,.0f} rows/s, resident {resident >> 20:,} MiB")
        for name, (files, size) in sizes(Path(url)).items():
            print(f"{name:<16} {files:>6,} files, {size / rows:>8.1f} bytes a row")
        for name in READERS:
            seconds, most = alone(read, name, url)
            print(f"{name}: {seconds:.1f} s, peak {most >> 20:,} MiB")
        ledger.drop(found.shards - 1)
        started = time.monotonic()
        again, _, _ = alone(scanned, captions, url)
        assert (again.exit_code, again.committed_now) == (0, 1), again
        print(f"resumed with one shard to do: {again.seconds:.1f} s, {time.monotonic() - started:.1f} s with start-up")


if __name__ == "__main__":
    main()
