"""What a second look costs and finds: first-step scores over disjoint draws of noises, by the fraction looked at again.

    python -m tests.benchmarks.bench_second_look [--second FOLDER] [--work DIR] [--noises 36] [--resamples 500]

Noise differences of the testbed's captions are kept in --work and made once (0.05 s a caption and noise on a quiet
core). A draw is four noises; its first is the first look; without a second look every noise is a draw. The first draw
and one half of the templates choose, the other draws and the other half report, and with --second every template of a
model of tests.recipe.second. A fraction is one of the never-seen captions: copied ones are few in a real table, and a
fifth here. Null maps are of all these captions, on the second model of others that it never saw. Brackets: least to
most over draws; then the 95 % interval of the mean, resampled over templates, unseen captions and draws; of a gain with
the same ones for both scores.
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
from tests.benchmarks.energy_maps import difference_maps, halves
from tests.benchmarks.subjects import METRICS, UNSEEN, Floats, Side, Subject, who
from tests.benchmarks.tables_noises import excess_pca

K, CHOOSING, SECOND_DRAWS = 4, 1, 3  # noises of a draw; draws that choose; draws of the second model
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)


Score = Callable[[torch.Tensor], torch.Tensor]  # of noise differences under one noise, [N, C, H, W]: [N]


def excess_of(windows: tuple[int, ...], sample: NDArray[np.bool_]) -> Score:
    """`excess` over some windows, measured against some of the captions."""

    def score(difference: torch.Tensor) -> torch.Tensor:
        logs = formulas.log_energy(formulas.energy_map(difference), windows)
        return formulas.excess(logs, *formulas.null_maps(logs[torch.from_numpy(sample)]))

    return score


def excess_pca_of(sample: NDArray[np.bool_]) -> Score:
    """`excess_pca`, measured against some of the captions."""

    def score(difference: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(
            excess_pca(difference[None].numpy(), difference[torch.from_numpy(sample)][None].numpy())
        )[0]

    return score


def ld_energy(difference: torch.Tensor) -> torch.Tensor:
    """`ld_energy`."""
    energy = formulas.energy_map(difference)
    return formulas.ld(energy, formulas.energy_mask(energy))


def first_step_scores(differences: np.ndarray, samples: dict[str, NDArray[np.bool_]]) -> dict[str, Floats]:
    """Every method's score of every noise and caption, [noises, N].

    Args:
        samples: of null maps, [N] by what is said of it; "" is there.
    """
    methods: dict[str, Score] = {
        "magnitude": lambda difference: formulas.magnitude(formulas.energy_map(difference)),
        "ld_energy": ld_energy,
        "excess, 3 x 3": excess_of((3,), samples[""]),
    }
    for words, sample in samples.items():
        methods[f"excess{words}"] = excess_of(formulas.EXCESS_WINDOWS, sample)
        methods[f"excess_pca{words}"] = excess_pca_of(sample)
    return {
        name: np.stack([method(torch.from_numpy(each.copy())).double().numpy() for each in differences])
        for name, method in methods.items()
    }


def looked_twice(scores: Floats, fraction: float, negative: NDArray[np.bool_]) -> list[Floats]:
    """Scores [N] of every draw of some noises [n, N], after a second look at a fraction.

    Looked at again is what exceeds the first scores of all but that fraction of the negatives [N]. Without a second
    look every noise is a draw by itself.
    """
    if not fraction:
        return list(scores)
    drawn = [(scores[at], scores[at : at + K].mean(0)) for at in range(0, len(scores), K)]
    if fraction == 1:
        return [mean for _, mean in drawn]
    return [np.where(first > np.quantile(first[negative], 1 - fraction), mean, first) for first, mean in drawn]


def table(
    title: str, sides: dict[str, Side], scores: dict[str, Floats], unseen: NDArray[np.bool_], resamples: int
) -> None:
    """Print one side's figures: a row a method and fraction; `scores` of whole draws, [draws * K, N].

    With resamples, another table of the gains over `ld_energy` that looks again as often.
    """
    print(f"\n### {title}: {len(scores['magnitude']) // K} draws of {K} noises, {who(sides)}\n")
    kinds = [f"{kind}: {name}" for kind in sides for name in METRICS]
    head = (
        "| score | looked at again | evaluations a caption | " + " | ".join(kinds) + " |\n|" + "---|" * (3 + len(kinds))
    )
    print(head)
    gains = []
    for method, values in scores.items():
        for fraction in FRACTIONS if "," not in method else (0.0, 0.1, 1.0):
            draws, base = (looked_twice(each, fraction, unseen) for each in (values, scores["ld_energy"]))
            cells, more = [], []
            for kind in kinds:
                where, _, name = kind.partition(": ")
                found, other = (sides[where].metric(name, each) for each in (draws, base))
                cell = f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})"
                if resamples:
                    cell += " [{:.3f}, {:.3f}]".format(*sides[where].interval(name, draws, resamples))
                    low, high = sides[where].gain(name, draws, base, resamples)
                    more.append(f"{(found - other).mean():+.3f} [{low:+.3f}, {high:+.3f}]")
                cells.append(cell)
            row = f"| {method} | {fraction:g} | {1 + (K - 1) * fraction:.2f} | "
            print(row + " | ".join(cells) + " |", flush=True)
            if resamples and method != "ld_energy" and fraction in (0, 0.1, 1):
                gains.append(row + " | ".join(more) + " |")
    if gains:
        print(f"\n### {title}: gain over ld_energy under the same noises\n\n{head}\n" + "\n".join(gains))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-noises")
    parser.add_argument("--second", type=Path, help="folder of a model that reports beside the testbed")
    parser.add_argument("--noises", type=int, default=36, help=f"in draws of {K}, of which the first chooses")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="few captions and noises: does it run?")
    args = parser.parse_args()
    frame = halves(1, 12) if args.quick else halves(4, 320)
    noises = K * (CHOOSING + 2) if args.quick else args.noises // K * K
    torch.set_num_threads(1)
    differences = difference_maps(frame.TEXT.tolist(), noises, args.work, 4 if args.quick else 50)
    unseen = frame.cluster.str.startswith("unseen").to_numpy()
    order = np.random.default_rng(0).permutation(len(unseen))
    samples = {"": order >= 0, ", null maps of 128": order < 128, ", null maps of 256": order < 256}
    scores = first_step_scores(differences, {**samples, ", null maps of unseen": unseen})
    for half, title, start, stop in ((0, "choose", 0, K * CHOOSING), (1, "report", K * CHOOSING, noises)):
        here = frame.half.to_numpy() == half
        sides = {
            kind: Side(frame.cluster.to_numpy(), here & frame.copied & (frame.label == kind), here & unseen)
            for kind in ("local", "global")
        }
        part = {name: values[start:stop] for name, values in scores.items()}
        table(title, sides, part, here & unseen, 0 if half == 0 else 20 if args.quick else args.resamples)
    if args.second:
        second = Subject.of(args.second, UNSEEN, K * SECOND_DRAWS, args.work)
        sample = np.isin(np.arange(len(second.frame)), second.samples["never seen"])
        scores = first_step_scores(second.differences.numpy(), {"": sample})
        table("the second model", second.sides(), scores, second.clean, args.resamples)


if __name__ == "__main__":
    main()
