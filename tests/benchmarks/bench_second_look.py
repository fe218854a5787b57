"""What a second look costs and finds: first-step scores over disjoint draws of noises, by the fraction looked at again.

    python -m tests.benchmarks.bench_second_look [--work DIR] [--noises 36] [--resamples 500]

Energy maps of the testbed's captions are kept in --work and made once (0.05 s a caption and noise on a quiet core). A
draw is four noises; its first is the first look. The first draw and one half of the templates choose, the other draws
and the other half report. A fraction is one of the never-seen captions: copied ones are few in a real table,
and a fifth here. Null maps are of all these captions. Brackets: least to most over draws; then the 95 % interval of
the mean, resampled over templates, unseen captions and draws.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import formulas
from tests.benchmarks.energy_maps import energy_maps, halves

K, CHOOSING = 4, 1  # noises of a draw; draws that choose
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
Floats = NDArray[np.float64]


def excess_of(windows: tuple[int, ...], sample: NDArray[np.bool_]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`excess` over some windows, measured against some of the captions."""

    def score(energy: torch.Tensor) -> torch.Tensor:
        logs = formulas.log_energy(energy, windows)
        median, spread = formulas.null_maps(logs[torch.from_numpy(sample)])
        return formulas.excess(logs, median, spread)

    return score


def first_step_scores(energies: np.ndarray, unseen: NDArray[np.bool_]) -> dict[str, Floats]:
    """Every method's score of every noise and caption, [noises, N]."""
    everyone = np.ones(len(unseen), bool)
    order = np.random.default_rng(0).permutation(len(unseen))
    methods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "magnitude": formulas.magnitude,
        "ld_energy": lambda energy: formulas.ld(energy, formulas.energy_mask(energy)),
        "excess, 3 x 3": excess_of((3,), everyone),
        "excess": excess_of(formulas.EXCESS_WINDOWS, everyone),
        "excess, null maps of 128": excess_of(formulas.EXCESS_WINDOWS, order < 128),
        "excess, null maps of 256": excess_of(formulas.EXCESS_WINDOWS, order < 256),
        "excess, null maps of unseen": excess_of(formulas.EXCESS_WINDOWS, unseen),
    }
    return {
        name: np.stack([method(torch.from_numpy(energy.copy())).double().numpy() for energy in energies])
        for name, method in methods.items()
    }


def looked_twice(scores: Floats, fraction: float, negative: NDArray[np.bool_]) -> Floats:
    """Scores of a draw [K, N] after a second look at what exceeds the first scores of all but a part of negatives."""
    first, mean = scores[0], scores.mean(0)
    if fraction in (0, 1):
        return mean if fraction else first
    return np.where(first > np.quantile(first[negative], 1 - fraction), mean, first)


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
        random, means = np.random.default_rng(0), []
        for _ in range(resamples):
            chosen = random.integers(len(self.groups), size=len(self.groups))
            positive = np.concatenate([self.groups[at] for at in chosen])
            negative = random.choice(self.negative, len(self.negative))
            picked = random.integers(len(draws), size=len(draws))
            means.append(np.mean([METRICS[name](draws[at][positive], draws[at][negative]) for at in picked]))
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)


def table(
    title: str, sides: dict[str, Side], scores: dict[str, Floats], unseen: NDArray[np.bool_], resamples: int
) -> None:
    """Print one side's figures: a row a method and fraction; `scores` of whole draws, [draws * K, N]."""
    print(f"\n### {title}\n")
    kinds = [f"{kind}: {name}" for kind in sides for name in (METRICS if kind == "local" else ("AUC", "TPR@1%FPR"))]
    print("| score | looked at again | evaluations a caption | " + " | ".join(kinds) + " |")
    print("|---|---|---|" + "---|" * len(kinds))
    for method, values in scores.items():
        for fraction in FRACTIONS if "," not in method else (0.0, 0.1, 1.0):
            draws = [looked_twice(values[at : at + K], fraction, unseen) for at in range(0, len(values), K)]
            cells = []
            for kind in kinds:
                where, _, name = kind.partition(": ")
                found = sides[where].metric(name, draws)
                cell = f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})"
                if resamples:
                    cell += " [{:.3f}, {:.3f}]".format(*sides[where].interval(name, draws, resamples))
                cells.append(cell)
            print(f"| {method} | {fraction:g} | {1 + (K - 1) * fraction:.2f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-noises")
    parser.add_argument("--noises", type=int, default=36, help=f"in draws of {K}, of which the first chooses")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="few captions and noises: does it run?")
    args = parser.parse_args()
    frame = halves(1, 12) if args.quick else halves(4, 320)
    noises = K * (CHOOSING + 2) if args.quick else args.noises // K * K
    torch.set_num_threads(1)
    energies = energy_maps(frame.TEXT.tolist(), noises, args.work, 4 if args.quick else 50)
    unseen = frame.cluster.str.startswith("unseen").to_numpy()
    scores = first_step_scores(energies, unseen)
    for half, title, start, stop in ((0, "choose", 0, K * CHOOSING), (1, "report", K * CHOOSING, noises)):
        here = frame.half.to_numpy() == half
        sides = {
            kind: Side(frame.cluster.to_numpy(), here & frame.copied & (frame.label == kind), here & unseen)
            for kind in ("local", "global")
        }
        local, whole = sides["local"], sides["global"]
        what = (
            f"{title}: {(stop - start) // K} draws of {K} noises, {len(local.positive)} copied local captions of "
            f"{len(local.groups)} templates, {len(whole.positive)} copied global, {len(local.negative)} never seen"
        )
        part = {name: values[start:stop] for name, values in scores.items()}
        table(what, sides, part, here & unseen, 0 if half == 0 else 20 if args.quick else args.resamples)


if __name__ == "__main__":
    main()
