"""What first-step scores are measured on: the testbed's captions or another model's, and who counts against whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.captions.hashes import caption_hashes
from audit.captions.sample import SAMPLE, LowestHashes
from audit.cli.demo import COPIED
from tests.benchmarks.energy_maps import difference_maps
from tests.benchmarks.tables_passes import captions_table, more_unseen

UNSEEN = 2500  # captions that a model never saw, of which a sample is taken; the rest is clean
Floats = NDArray[np.float64]
Chosen = tuple[NDArray[np.int64], NDArray[np.int64]]


def auc(positive: Floats, negative: Floats) -> float:
    """Chance that a positive scores above a negative, ties half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(ordered)))


def tpr(positive: Floats, negative: Floats, rate: float) -> float:
    """Largest share of positives above a threshold that at most this share of negatives exceeds."""
    return float((positive > np.sort(negative)[-1 - int(rate * len(negative))]).mean())


METRICS: dict[str, Callable[[Floats, Floats], float]] = {
    "AUC": auc,
    "TPR@1%FPR": lambda positive, negative: tpr(positive, negative, 0.01),
    "TPR@0.1%FPR": lambda positive, negative: tpr(positive, negative, 0.001),
}


class Side:
    """One half of the templates under some draws: who is positive, who is negative, and what is resampled."""

    def __init__(self, clusters: np.ndarray, positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> None:
        self.positive, self.negative = np.flatnonzero(positive), np.flatnonzero(negative)
        names = clusters[self.positive]
        self.groups = [self.positive[names == name] for name in dict.fromkeys(names)]

    def metric(self, name: str, draws: list[Floats]) -> Floats:
        """Of each draw's scores [N]."""
        return np.array([METRICS[name](draw[self.positive], draw[self.negative]) for draw in draws])

    def interval(self, name: str, draws: list[Floats], resamples: int) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over draws, over templates, unseen captions and draws."""
        return self._interval(lambda at, of: METRICS[name](draws[at][of[0]], draws[at][of[1]]), len(draws), resamples)

    def gain(self, name: str, draws: list[Floats], baseline: list[Floats], resamples: int) -> tuple[float, float]:
        """95 % interval, as `interval`, of what a score finds more than another one under the same noises."""

        def more(at: int, of: Chosen) -> float:
            found, other = (METRICS[name](each[at][of[0]], each[at][of[1]]) for each in (draws, baseline))
            return found - other

        return self._interval(more, len(draws), resamples)

    def _interval(self, figure: Callable[[int, Chosen], float], draws: int, resamples: int) -> tuple[float, float]:
        """Of the mean over draws of a figure of a draw and of rows: resampled positive and negative ones."""
        random, means = np.random.default_rng(0), []
        for _ in range(resamples):
            chosen = random.integers(len(self.groups), size=len(self.groups))
            positive = np.concatenate([self.groups[at] for at in chosen])
            negative = random.choice(self.negative, len(self.negative))
            means.append(np.mean([figure(at, (positive, negative)) for at in random.integers(draws, size=draws)]))
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)


def who(sides: dict[str, Side]) -> str:
    """How many of whom."""
    local, whole = sides["local"], sides["global"]
    return (
        f"{len(local.positive)} copied local captions of {len(local.groups)} templates, {len(whole.positive)} copied "
        f"global ones, {len(local.negative)} never seen"
    )


@dataclass
class Subject:
    """A model's captions, and their noise differences under a bank of noises."""

    frame: pd.DataFrame  # TEXT, cluster, label, copied, half
    differences: torch.Tensor  # [K, N, C, H, W]
    samples: dict[str, NDArray[np.int64]]  # rows that null maps are of, by kind
    clean: NDArray[np.bool_]  # [N]: never seen, and in no sample

    @classmethod
    def of(cls, folder: Path, unseen: int, noises: int, work: Path) -> Subject:
        """Its table and others that it never saw; `folder` is laid out as the testbed is."""
        if folder == testbed.PIPELINE.parent:
            table = captions_table()
        else:
            table = pq.read_table(folder / "captions.parquet").to_pandas().drop_duplicates("TEXT")
            table = table.assign(copied=table.copy_error < COPIED, half=0)
        frame = pd.concat([table, more_unseen(unseen, set(table.TEXT))]).reset_index(drop=True)
        lowest = LowestHashes(SAMPLE)
        lowest.add(0, caption_hashes(pa.array(table.TEXT)))
        others = np.random.default_rng(0).permutation(np.flatnonzero(frame.cluster.str.startswith("unseen-more")))
        few = min(SAMPLE, len(others) // 2)
        clean = np.zeros(len(frame), bool)
        clean[others[few:]] = True
        maps = difference_maps(frame.TEXT.tolist(), noises, work, model=folder / "pipeline")
        samples = {"never seen": others[:few], "the run's own": np.sort(lowest.rows)}
        return cls(frame, torch.from_numpy(maps), samples, clean)

    def sides(self, half: int | None = None) -> dict[str, Side]:
        """Copied local and global captions, of one half of the templates or of all, against clean ones."""
        here = np.ones(len(self.frame), bool) if half is None else self.frame.half.to_numpy() == half
        copied, label = self.frame.copied.to_numpy(bool) & here, self.frame.label.to_numpy()
        clusters, clean = self.frame.cluster.to_numpy(), self.clean & here
        return {kind: Side(clusters, copied & (label == kind), clean) for kind in ("local", "global")}
