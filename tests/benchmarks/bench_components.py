"""`excess_pca` against `excess`: what is left without the common part of other captions' noise differences.

    python -m tests.benchmarks.bench_components [--noises 8] [--resamples 200]

On the testbed, every copied caption against captions it never saw (drawn anew from its world), with null maps of two
samples: captions it never saw, and the run's own as a scan takes them, of which a seventh is copied. For numbers of
components, with the calmer four fifths of the sample and with all of it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray

from audit.captions.hashes import caption_hashes
from audit.captions.sample import SAMPLE, LowestHashes
from pipelines import formulas
from tests.benchmarks.bench_second_look import Floats, Side
from tests.benchmarks.energy_maps import difference_maps
from tests.benchmarks.tables_passes import captions_table, more_unseen

SHOWN = (("local", "AUC"), ("local", "TPR@1%FPR"), ("local", "TPR@0.1%FPR"), ("global", "AUC"), ("global", "TPR@1%FPR"))


def excess(energies: torch.Tensor, sample: NDArray[np.int64]) -> Floats:
    """Of energy maps [N, H, W], against those of the sample, [N]."""
    logs = formulas.log_energy(energies)
    return formulas.excess(logs, *formulas.null_maps(logs[sample])).numpy()


def all_scores(differences: torch.Tensor, sample: NDArray[np.int64], counts: list[int]) -> dict[str, Floats]:
    """Scores of every noise, name -> [K, N]; `differences` is [K, N, C, H, W]."""
    energies = [formulas.energy_map(each) for each in differences]
    found = {
        "magnitude": [formulas.magnitude(each).numpy() for each in energies],
        "`ld_energy`": [formulas.ld(each, formulas.energy_mask(each)).numpy() for each in energies],
        "`excess`": [excess(each, sample) for each in energies],
    }
    for calm in (formulas.CALM, 1.0):
        for count in counts if calm < 1 else [formulas.COMPONENTS]:
            name = f"{count} components of {'four fifths' if calm < 1 else 'all'}"
            if (count, calm) == (formulas.COMPONENTS, formulas.CALM):
                name = f"`excess_pca`: {name}"
            found[name] = []
            for each in differences:
                parts = formulas.common_parts(each[sample], count, calm)
                left = formulas.energy_map(formulas.less_common(each, parts))
                usual = formulas.log_energy(left[sample], formulas.PEAK_WINDOWS)[:, 0].median(0).values
                found[name].append(formulas.peak(left, usual).numpy())
    return {name: np.stack(values) for name, values in found.items()}


def held(differences: torch.Tensor) -> float:
    """Share of a sample's variance that its common parts hold."""
    parts = formulas.common_parts(differences, share=1.0)
    left = formulas.less_common(differences, parts).square().sum()
    return float(1 - left / (differences - parts[0]).square().sum())


def captions(unseen: int) -> pd.DataFrame:
    """Distinct captions of the testbed, and others it never saw; `own`: sampled by a scan of the testbed's table."""
    table = captions_table().drop_duplicates("TEXT")
    more = more_unseen(unseen, set(table.TEXT))
    lowest = LowestHashes(SAMPLE)
    lowest.add(0, caption_hashes(pa.array(table.TEXT)))
    own = np.zeros(len(table), bool)
    own[lowest.rows] = True
    return pd.concat([table.assign(own=own), more.assign(own=False)]).reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-noises")
    parser.add_argument("--noises", type=int, default=8)
    parser.add_argument("--unseen", type=int, default=2000, help="of which a sample is taken, and the rest is clean")
    parser.add_argument("--components", type=int, nargs="+", default=[4, 8, 16, 24, 32])
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    frame = captions(args.unseen)
    differences = torch.from_numpy(difference_maps(frame.TEXT.tolist(), args.noises, args.work))
    more = np.random.default_rng(0).permutation(np.flatnonzero(frame.cluster.str.startswith("unseen-more")))
    samples = {"never seen": more[: min(SAMPLE, len(more) // 2)], "the run's own": np.flatnonzero(frame.own)}
    clean = np.zeros(len(frame), bool)
    clean[more[len(samples["never seen"]) :]] = True
    copied, label, clusters = frame.copied.to_numpy(bool), frame.label.to_numpy(), frame.cluster.to_numpy()
    sides = {kind: Side(clusters, copied & (label == kind), clean) for kind in ("local", "global")}
    local, whole = sides["local"], sides["global"]
    print(
        f"{len(local.positive)} copied local captions of {len(local.groups)} templates, {len(whole.positive)} copied "
        f"global ones, {clean.sum()} never seen, {args.noises} noises; of the run's own sample "
        f"{copied[frame.own.to_numpy()].mean():.0%} is copied; {formulas.COMPONENTS} components hold "
        f"{held(differences[0][samples['never seen']]):.0%} of the variance of the captions never seen, one noise\n"
    )
    kinds = [f"{kind}: {name}" for kind, name in SHOWN]
    print("| null maps of | noises | score | " + " | ".join(kinds) + " |\n|" + "---|" * (3 + len(kinds)))
    for sample, rows in samples.items():
        for name, values in all_scores(differences, rows, args.components).items():
            for count in (1, 4):
                draws = [values[at : at + count].mean(0) for at in range(0, len(values) - count + 1, count)]
                cells = []
                for kind, metric in SHOWN:
                    found = sides[kind].metric(metric, draws)
                    low, high = sides[kind].interval(metric, draws, args.resamples)
                    cells.append(f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f}) [{low:.3f}, {high:.3f}]")
                print(f"| {sample} | {count} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
