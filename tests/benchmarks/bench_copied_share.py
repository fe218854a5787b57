"""How much of a table may be copied: `excess` measures against the table's own captions, whatever these are.

    python -m tests.benchmarks.bench_copied_share [--second SECOND] [--choose 4] [--report 8]

Null maps of 160 captions, no more than there are copied ones, of which a share is copied and the rest never seen. The
first noises and one half of the testbed's templates choose; the other half, and every template of another model
(`python -m tests.recipe.second`), report under other noises. Magnitude and `ld_energy` have no null maps: what they
find is the same at every share.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from audit import testbed
from tests.benchmarks.bench_components import Setting, known_scores, settings_scores
from tests.benchmarks.subjects import METRICS, UNSEEN, Side, Subject, who

SIZE = 160
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
WITH_NULL_MAPS = ("`excess`", "`excess_pca`")


def with_shares(subject: Subject) -> None:
    """Instead of its samples those of SHARES: copied captions and captions never seen, drawn by seed."""
    draw = np.random.default_rng(0)
    copied = draw.permutation(np.flatnonzero(subject.frame.copied))
    others = subject.samples["never seen"]
    subject.samples = {
        f"{share:.0%}": np.concatenate([copied[: round(share * SIZE)], others[: SIZE - round(share * SIZE)]])
        for share in SHARES
    }


def show(title: str, subject: Subject, sides: dict[str, Side], noises: slice) -> None:
    """A row a score and share: means over the noises, and the least of them."""
    shown = [(kind, metric) for kind in ("local", "global") for metric in METRICS]
    print(f"\n### {title}: {who(sides)}\n")
    print("| score | copied in the null maps | " + " | ".join(f"{kind}: {metric}" for kind, metric in shown) + " |")
    print("|" + "---|" * (2 + len(shown)))
    for sample in subject.samples:
        scores = known_scores(subject, sample, noises)
        scores["`excess_pca`"] = settings_scores(subject, sample, noises, [Setting()])[Setting()]
        for name, values in scores.items():
            if name not in WITH_NULL_MAPS and sample != next(iter(subject.samples)):
                continue
            cells = []
            for kind, metric in shown:
                found = sides[kind].metric(metric, list(values))
                cells.append(f"{found.mean():.3f} ({found.min():.3f})")
            of = sample if name in WITH_NULL_MAPS else "none"
            print(f"| {name} | {of} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--second", type=Path, help="folder of a model that reports beside the testbed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-noises")
    parser.add_argument("--choose", type=int, default=4, help="noises that choose")
    parser.add_argument("--report", type=int, default=8, help="noises after them that report")
    args = parser.parse_args()
    noises = args.choose + args.report
    ours = Subject.of(testbed.PIPELINE.parent, UNSEEN, noises, args.work)
    with_shares(ours)
    show("Choosing, half of the testbed's templates", ours, ours.sides(0), slice(args.choose))
    show("The testbed's other half", ours, ours.sides(1), slice(args.choose, None))
    if args.second:
        second = Subject.of(args.second, UNSEEN, noises, args.work)
        with_shares(second)
        show("The second model", second, second.sides(), slice(args.choose, None))


if __name__ == "__main__":
    main()
