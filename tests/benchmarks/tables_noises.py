"""Figures over a bank of noises: their spread, intervals over templates and noises, K noises together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from audit.statistics.intervals import Statistic, cluster_bootstrap
from audit.statistics.metrics import auc, max_f1, tpr_at_fpr
from pipelines import formulas
from pipelines.null_maps import NullMaps
from tests.benchmarks.tables_page import Row

METRICS: dict[str, Statistic] = {
    "auc": auc,
    "f1": max_f1,
    "tpr_1": functools.partial(tpr_at_fpr, alpha=0.01),
    "tpr_01": functools.partial(tpr_at_fpr, alpha=0.001),
}
RESAMPLES, COMBINATIONS = 400, 32
REDUCE: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max}
WINDOWS = (3, 5, 9, 0)  # of `excess`; 0 is the whole map
Values = NDArray[Any]


def figure(
    score: str,
    kind: str,
    values: Values,
    memorised: NDArray[np.bool_],
    baseline: Values,
    clusters: Any,
    draws: int = 1,
    reduce: str = "mean",
    resamples: int = RESAMPLES,
) -> Row:
    """Every metric of a score that takes `draws` noises a caption, as a row of a table.

    The figure is the mean over disjoint groups of noises, with the least and the most of them. A resample is whole
    clusters drawn with replacement and, with replacement too, `draws` noises: what another model of the same kind and
    another seed might have given. `gain` is the AUC minus that of `baseline` under one of those noises.

    Args:
        values, baseline: [noises, n]. memorised: [n]. clusters: [n]. reduce: mean or max over the noises of a caption.
    """
    together = functools.partial(REDUCE[reduce], axis=0)
    groups = [list(range(at, at + draws)) for at in range(0, len(values) - draws + 1, draws)]
    numbers = np.random.default_rng(0).integers(len(values), size=(COMBINATIONS, draws)).tolist()
    drawn = [[each] for each in range(len(values))] if draws == 1 else numbers
    truth, clusters = np.asarray(memorised, bool), np.asarray(clusters, object)

    def metrics(of: Callable[[list[int]], Statistic], name: str) -> Row:
        """`of` makes a statistic of the noises; the scores it is called with say nothing."""
        ones, nothing = np.ones((1, len(truth))), np.zeros(len(truth))
        seen = [float(of(group)(nothing, truth, ones)[0]) for group in groups]
        pick = np.random.default_rng(1)

        def resampled(_: Any, labels: Any, weights: Any, /) -> Any:
            chosen, found = pick.integers(len(drawn), size=len(weights)), np.zeros(len(weights))
            for each in np.unique(chosen):
                found[chosen == each] = of(drawn[each])(nothing, labels, weights[chosen == each])
            return found

        low, high = cluster_bootstrap(resampled, nothing, truth, clusters, num_resamples=resamples)
        return {name: float(np.mean(seen)), f"{name}_low": low, f"{name}_high": high,
                f"{name}_least": min(seen), f"{name}_most": max(seen)}  # fmt: skip

    def statistic(metric: Statistic, noises: list[int]) -> Statistic:
        return lambda _, labels, weights: metric(together(values[noises]), labels, weights)

    def difference(noises: list[int]) -> Statistic:
        of = statistic(auc, noises)
        return lambda _, labels, weights: of(_, labels, weights) - auc(baseline[noises[0]], labels, weights)

    row: Row = {"score": score, "type": kind, "noises": draws, "over_noises": reduce}
    row |= {"memorised": int(truth.sum()), "clean": int((~truth).sum())}
    for name, metric in METRICS.items():
        row |= metrics(functools.partial(statistic, metric), name)
    return row | metrics(difference, "gain")


def excess(energy: NDArray[np.float32], null: NDArray[np.float32], windows: tuple[int, ...] = WINDOWS) -> Values:
    """Largest cell of the log energy map standardised per noise, cell and window by the null captions.

    Args:
        energy: [noises, N, H, W]. null: of the captions that say what is usual. windows: of the smoothing mean.
    Returns:
        [noises, N].
    """
    found = []
    for maps, others in zip(torch.from_numpy(energy).float(), torch.from_numpy(null).float(), strict=True):
        logs, usual = (torch.stack([_smooth(each, size) for size in windows], 1).log() for each in (maps, others))
        median = usual.quantile(0.5, 0)
        spread = (usual.quantile(0.84, 0) - median).clamp_min(1e-3)
        found.append(((logs - median) / spread).amax((1, 2, 3)).numpy())
    return np.stack(found)


def excess_pca(differences: NDArray[np.float32], null: NDArray[np.float32]) -> Values:
    """The product's `excess_pca` with null maps of the null captions, [noises, N]; both are [noises, N, C, H, W]."""
    found = []
    for each, others in zip(torch.from_numpy(differences), torch.from_numpy(null), strict=True):
        residual = NullMaps.of_differences([others]).residual
        assert residual is not None
        rows = residual.take(torch.zeros(len(each), dtype=torch.int64))
        found.append(formulas.peak(rows.energy(each), rows.usual).numpy())
    return np.stack(found)


def _smooth(maps: torch.Tensor, size: int) -> torch.Tensor:
    if size == 0:
        return maps.mean((1, 2), keepdim=True).expand_as(maps)
    return F.avg_pool2d(maps[:, None], size, stride=1, padding=size // 2, count_include_pad=False)[:, 0]
