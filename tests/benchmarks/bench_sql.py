"""Time of every query in sql/ over a run of many rows.

    python tests/benchmarks/bench_sql.py [ROWS]     (1,000,000 by default; exit status 1 when one takes over 10 s)

The run is fabricated (tests/fabricate.py): one row in five repeats an earlier caption, shards of 16,384 rows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from audit.reports.sql import queries, run_query
from tests.fabricate import add_confirm, make_run

BUDGET = 10.0


def main(rows: int) -> int:
    """Print one line a query; 1 when one is over budget."""
    numbers = np.random.default_rng(0).integers(0, int(rows * 0.8), rows).tolist()
    captions = [f"Brand {n % 5000} model {n} in colour {n % 13}" for n in numbers]
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), captions, rows_per_shard=16_384)
        add_confirm(run, ["global", "local", "none", "none"] * 25)
        size = sum(file.stat().st_size for file in Path(run.url, "scores").rglob("*.arrow")) / 1e6
        print(f"{rows:,} rows, {run.facts['unique']:,} different captions, {size:.0f} MB of scores")
        for name in queries():
            started = time.perf_counter()
            answer = run_query(name, run.url)
            seconds = time.perf_counter() - started
            print(f"{name:<12} {seconds:6.2f} s  {answer.num_rows:,} rows")
            slow += seconds > BUDGET
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
