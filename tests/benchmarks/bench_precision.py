"""How far lower precision moves the scores: rank correlation with float32, and flips at the median threshold.

On the testbed, and at the first level of random models of PixArt's and SD 3's shape, where the difference of two
predictions is smallest. Null maps (of `excess`) are made in the dtype that is measured, as a run has them.

Run: python -m tests.benchmarks.bench_precision [--captions 96]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.stats import kendalltau

from audit import testbed
from pipelines import FirstStepScorer, find_model, load
from pipelines.null_maps import NullMaps
from tests.tiny import save_model

LOWER = ("float16", "bfloat16", "float8")
SAMPLE = 32  # captions of the null maps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=96)
    count = parser.parse_args().captions
    captions = list(dict.fromkeys(pq.read_table(testbed.CAPTIONS)["TEXT"].to_pylist()))[:count]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"testbed": testbed.PIPELINE}
        folders |= {f"random {kind}": save_model(kind, Path(temporary, kind)) for kind in ("pixart", "sd3")}
        for name, folder in folders.items():
            found = {}
            for dtype in ("float32", *LOWER):
                model = load(find_model(str(folder)), "cpu", dtype)
                maps = NullMaps.of_differences([FirstStepScorer(model).differences(captions[:SAMPLE])[:, 0]])
                found[dtype] = FirstStepScorer(model, null_maps=maps)(captions).scores
            for score, exact in found["float32"].items():
                for dtype in LOWER:
                    rough, threshold = found[dtype][score], np.median(exact)
                    rows.append(
                        {
                            "model": name,
                            "score": score,
                            "dtype": dtype,
                            "Kendall tau": f"{kendalltau(exact, rough).statistic:.3f}",
                            "median relative error": f"{np.median(np.abs(rough / exact - 1)):.1e}",
                            "flips": f"{int(((exact > threshold) != (rough > threshold)).sum())} of {len(exact)}",
                        }
                    )
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()
