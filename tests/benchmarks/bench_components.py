"""Settings of `excess_pca`, chosen on half of the testbed's templates, reported on the others and on another model.

    python -m tests.recipe.second SECOND
    python -m tests.benchmarks.bench_components --second SECOND [--choose 4] [--report 8] [--resamples 200]

The first noises and one half of the templates choose. Other noises report: the other half, and every template of the
second model, of which nothing was seen before. Copied captions count against captions that a model
never saw. Null maps are of two samples: captions never seen, and the run's own as a scan takes them, of which a part is
copied. A gain is resampled in pairs: the same templates, clean captions and noises for both scores.

What is chosen by: the mean TPR over all false-positive rates up to 1 %, over samples, local and global copies.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audit import testbed
from pipelines import formulas
from tests.benchmarks.subjects import METRICS, UNSEEN, Floats, Side, Subject, who

SHOWN = tuple(itertools.product(("local", "global"), METRICS))


class Setting(NamedTuple):
    """One way of making `excess_pca`."""

    components: int = formulas.COMPONENTS
    calm: float = formulas.CALM  # share of the sample that the components are of
    spread: bool = False  # divided by it, as `excess` is
    windows: tuple[int, ...] = formulas.PEAK_WINDOWS

    def __str__(self) -> str:
        windows = "four windows" if len(self.windows) > 1 else "3 x 3"
        return f"{self.components} of {self.calm:.0%}, {'over the spread' if self.spread else 'no spread'}, {windows}"


GRID = [
    Setting(*each)
    for each in itertools.product(
        (8, 16, 24, 32), (0.6, 0.8, 1.0), (False, True), (formulas.PEAK_WINDOWS, formulas.EXCESS_WINDOWS)
    )
]


def settings_scores(subject: Subject, sample: str, noises: slice, grid: list[Setting]) -> dict[Setting, Floats]:
    """Scores of every setting, [K, N] each."""
    rows, found = torch.from_numpy(subject.samples[sample]), {each: [] for each in grid}
    for difference in subject.differences[noises]:
        for calm in {each.calm for each in grid}:
            parts = formulas.common_parts(difference[rows], max(each.components for each in grid), calm)
            for count in {each.components for each in grid}:
                energy = formulas.energy_map(formulas.less_common(difference, parts[: 1 + count]))
                logs = formulas.log_energy(energy)
                median, spread = formulas.null_maps(logs[rows])
                for each in (each for each in grid if (each.components, each.calm) == (count, calm)):
                    at = [formulas.EXCESS_WINDOWS.index(window) for window in each.windows]
                    over = (logs[:, at] - median[at]) / (spread[at] if each.spread else 1)
                    found[each].append(over.amax((1, 2, 3)).double().numpy())
    return {each: np.stack(values) for each, values in found.items()}


def known_scores(subject: Subject, sample: str, noises: slice) -> dict[str, Floats]:
    """Scores without components, [K, N] each."""
    rows = torch.from_numpy(subject.samples[sample])
    found: dict[str, list[Floats]] = {"magnitude": [], "`ld_energy`": [], "`excess`": []}
    for difference in subject.differences[noises]:
        energy = formulas.energy_map(difference)
        logs = formulas.log_energy(energy)
        found["magnitude"].append(formulas.magnitude(energy).double().numpy())
        found["`ld_energy`"].append(formulas.ld(energy, formulas.energy_mask(energy)).double().numpy())
        found["`excess`"].append(formulas.excess(logs, *formulas.null_maps(logs[rows])).double().numpy())
    return {name: np.stack(values) for name, values in found.items()}


def held(differences: torch.Tensor) -> float:
    """Share of a sample's variance that its common parts hold."""
    parts = formulas.common_parts(differences, share=1.0)
    left = formulas.less_common(differences, parts).square().sum()
    return float(1 - left / (differences - parts[0]).square().sum())


def at_the_tail(positive: Floats, negative: Floats, rate: float = 0.01) -> float:
    """Mean TPR over the false-positive rates 0, 1/n, ... up to `rate`."""
    thresholds = np.sort(negative)[::-1][: 1 + int(rate * len(negative))]
    return float((positive[:, None] > thresholds).mean())


def choose(subject: Subject, sides: dict[str, Side], noises: slice, grid: list[Setting]) -> Setting:
    """The setting of the best mean over samples and kinds; prints all, and the scores without components."""
    found: dict[Setting | str, dict[str, float]] = {}
    for sample in subject.samples:
        scores: dict[Setting | str, Floats] = {**settings_scores(subject, sample, noises, grid)}
        for name, values in {**scores, **known_scores(subject, sample, noises)}.items():
            for kind, side in sides.items():
                tails = [at_the_tail(draw[side.positive], draw[side.negative]) for draw in values]
                found.setdefault(name, {})[f"{sample}, {kind}"] = float(np.mean(tails))
    order = sorted(found, key=lambda each: -float(np.mean([*found[each].values()])))
    columns = list(found[order[0]])
    print(f"\n### Choosing: mean TPR up to 1 % FPR; {who(sides)}\n")
    print("| score, or setting | mean | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    for each in order:
        values = [found[each][column] for column in columns]
        name = f"**{each}** (shipped)" if each == Setting() else str(each)
        print(f"| {name} | {np.mean(values):.4f} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return next(each for each in order if isinstance(each, Setting))


def report(
    title: str, subject: Subject, sides: dict[str, Side], noises: slice, chosen: Setting, resamples: int
) -> None:
    """Two tables over some of the noises, one noise and the mean of four: every score, and its gain over ld_energy."""
    columns = [f"{kind}: {metric}" for kind, metric in SHOWN]
    head = "| null maps of | noises | score | " + " | ".join(columns) + " |\n|" + "---|" * (3 + len(columns))
    print(f"\n### {title}: {who(sides)}\n\n{head}")
    gains = []
    for sample in subject.samples:
        of_settings = settings_scores(subject, sample, noises, list(dict.fromkeys([Setting(), chosen])))
        named = {f"`excess_pca`: {each}" if each == Setting() else f"chosen: {each}": values
                 for each, values in of_settings.items()}  # fmt: skip
        scores = known_scores(subject, sample, noises) | named
        for name, values in scores.items():
            for count in (each for each in (1, 4) if each <= len(values)):
                draws, base = (
                    [each[at : at + count].mean(0) for at in range(0, len(values) - count + 1, count)]
                    for each in (values, scores["`ld_energy`"])
                )
                cells, more = [], []
                for kind, metric in SHOWN:
                    found, other = (sides[kind].metric(metric, each) for each in (draws, base))
                    low, high = sides[kind].interval(metric, draws, resamples)
                    cells.append(f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f}) [{low:.3f}, {high:.3f}]")
                    low, high = sides[kind].gain(metric, draws, base, resamples)
                    more.append(f"{(found - other).mean():+.3f} [{low:+.3f}, {high:+.3f}]")
                print(f"| {sample} | {count} | {name} | " + " | ".join(cells) + " |", flush=True)
                if name != "`ld_energy`":
                    gains.append(f"| {sample} | {count} | {name} | " + " | ".join(more) + " |")
    print(f"\n### {title}: gain over `ld_energy` under the same noises\n\n{head}\n" + "\n".join(gains))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--second", type=Path, help="folder of a model that reports beside the testbed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-noises")
    parser.add_argument("--choose", type=int, default=4, help="noises that choose")
    parser.add_argument("--report", type=int, default=8, help="noises after them that report")
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    noises, reporting = args.choose + args.report, slice(args.choose, None)
    ours = Subject.of(testbed.PIPELINE.parent, UNSEEN, noises, args.work)
    share = held(ours.differences[0][torch.from_numpy(ours.samples["never seen"])])
    print(f"{formulas.COMPONENTS} components hold {share:.0%} of the variance of captions never seen, under one noise")
    chosen = choose(ours, ours.sides(0), slice(args.choose), GRID)
    report("The testbed's other half", ours, ours.sides(1), reporting, chosen, args.resamples)
    if args.second:
        second = Subject.of(args.second, UNSEEN, noises, args.work)
        report("The second model", second, second.sides(), reporting, chosen, args.resamples)


if __name__ == "__main__":
    main()
