"""The region that people are shown: which smoothing and which threshold, that needs no truth, cut the mask best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from audit import testbed
from pipelines import formulas
from tests.benchmarks.tables_masks import mean_over
from tests.benchmarks.tables_page import Page, Row, between
from tests.benchmarks.tables_scores import sample_of

Values = NDArray[np.float64]


def otsu(values: Values) -> Values:
    """Otsu's threshold of every row of [R, n]: of the splits of its sorted values the one with the largest variance
    between the two classes (Otsu 1979); above it is the region. [R]."""
    ordered = np.sort(values, 1)
    count = np.arange(1, ordered.shape[1])
    share, below = count / ordered.shape[1], np.cumsum(ordered, 1)[:, :-1]
    total = ordered.sum(1, keepdims=True)
    between_classes = (total * share - below) ** 2 / (share * (1 - share))
    between_classes[ordered[:, 1:] == ordered[:, :-1]] = -1  # equal values are on one side
    return np.take_along_axis(ordered, between_classes.argmax(1)[:, None], 1)[:, 0]


THRESHOLDS: dict[str, Callable[[Values], Values]] = {
    "mean": lambda m: m.mean(1),
    "1.25 x mean": lambda m: 1.25 * m.mean(1),
    "1.5 x mean": lambda m: 1.5 * m.mean(1),
    "2 x mean": lambda m: 2 * m.mean(1),
    "0.75 x mean": lambda m: 0.75 * m.mean(1),
    "median": lambda m: np.median(m, 1),
    "70 % quantile": lambda m: np.quantile(m, 0.7, axis=1),
    "half of the maximum": lambda m: m.max(1) / 2,
    "Otsu": otsu,
    "Otsu of the logarithm": lambda m: np.exp(otsu(np.log(np.maximum(m, 1e-12)))),
    "geometric mean": lambda m: np.exp(np.log(np.maximum(m, 1e-12)).mean(1)),
}


def shown_region(page: Page, frame: pd.DataFrame, energy: NDArray[np.float32]) -> list[Row]:
    """Table 2: IoU of the thresholded energy mask; chosen on half of the templates and of the noises, reported on the
    others. Returns its rows."""
    copied = sample_of(frame, "measured copying", "local")[1]
    half, clusters = frame.half.to_numpy()[copied], frame.cluster.to_numpy()[copied]
    middle, maps = len(energy) // 2, torch.from_numpy(energy[:, copied])
    sides = {"choose": (half == 0, slice(0, middle)), "report": (half == 1, slice(middle, None))}
    regions = testbed.regions()
    truth = np.stack([regions[cluster].ravel() for cluster in clusters])
    rows: list[Row] = []
    for noises in ("one", "all"):
        for size in (1, 3, 5):
            flat = {}
            for side, (_, part) in sides.items():
                of = maps[part] if noises == "one" else maps[part].mean(0, keepdim=True)
                flat[side] = [_large(formulas.energy_mask(each, size)) for each in of]
            for name, threshold in THRESHOLDS.items():
                row: Row = {"noises": noises, "smoothing": size, "threshold": name}
                for side, (of_half, _) in sides.items():
                    iou = np.stack([_iou(mask[of_half], truth[of_half], threshold) for mask in flat[side]])
                    row |= mean_over(iou, clusters[of_half], f"{side}_iou")
                rows.append(row)
    stored = [row for row in rows if row["noises"] == "one" and row["smoothing"] == 3]
    averaged = [row for row in rows if row["noises"] == "all"]
    best = [max(part, key=lambda row: row["choose_iou"]) for part in (stored, averaged)]
    for row in rows:
        row["chosen"] = any(row is each for each in best)
    page.text("## 2. Which region to show?")
    page.text(
        "Energy mask of the first step, brought to 64 x 64 and cut at a threshold that needs no truth, against the "
        f"true regions: IoU, mean over {copied.sum()} captions of {len(set(clusters))} copied templates. Chosen on "
        f"one half "
        "of the templates and of the noises, reported on the others. *one noise*: each image's own mask, smoothed 3 x "
        "3, as a run stores it and the report "
        f"draws it; *mean*: of the energy maps of {middle} noises. **Bold**: best of these on the choosing half, with "
        f"one noise of the 3 x 3 ones. All "
        f"{len(rows)} are in the CSV."
    )
    page.table("regions", rows, {
        "noises": lambda row: "one noise" if row["noises"] == "one" else f"mean of {middle}",
        "smoothing": lambda row: f"{row['smoothing']} x {row['smoothing']}",
        "threshold": lambda row: f"**{row['threshold']}**" if row["chosen"] else row["threshold"],
        "IoU, choosing": lambda row: f"{row['choose_iou']:.3f}",
        "IoU, reporting": lambda row: between(row, "report_iou"),
    }, lambda row: row["chosen"] or row["smoothing"] == 3)  # fmt: skip
    return rows


def _large(masks: Any) -> Values:
    return formulas.resize_mask(masks, (64, 64)).flatten(1).double().numpy()


def _iou(masks: Values, truth: NDArray[np.bool_], threshold: Callable[[Values], Values]) -> Values:
    """Of every row of [n, pixels]."""
    region = masks > threshold(masks)[:, None]
    return (region & truth).sum(1) / (region | truth).sum(1)
