"""How good are the verdicts of `be-audit confirm`? Printed against the testbed's measured truth.

    python tests/benchmarks/bench_confirm.py [--work DIR] [--num-images K] [--none N] [--quick]

Scans and confirms every copied local caption, every global one and N captions the model never saw, then decides again
under every match mask and several rates (the images are generated once). Resumable in --work. Takes about 8 minutes on
two quiet CPU cores for one image a caption. The testbed is small and not Stable Diffusion.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audit import testbed
from audit.cli.demo import COPIED
from audit.index import IndexConfig, build_index
from audit.run.read import read_stage
from audit.run.run import Run
from audit.scores.scan import ScanConfig, scan
from audit.statistics.intervals import cluster_bootstrap, share_interval
from audit.statistics.metrics import auc
from audit.verdicts.confirm import ConfirmConfig, ConfirmSummary, confirm

SCORES = ("sscd", "s", "ls", "ls_norm", "ls_energy", "ls_score")


def choose(num_none: int, per_template: int) -> pa.Table:
    """Distinct captions: all global, `per_template` of every template, `num_none` unseen."""
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    local = table[table.label == "local"].groupby("cluster").head(per_template)
    unseen = table[table.cluster.str.startswith("unseen")].head(num_none)
    chosen = [table[table.label == "global"], local, unseen]
    return pa.Table.from_pylist([row for part in chosen for row in part.to_dict("records")])


def groups(truth: dict[str, dict]) -> dict[str, list[str]]:
    """Captions by what was measured of them."""
    copied = {text for text, row in truth.items() if (row["copy_error"] or 1) < COPIED}
    of = lambda label, want: [t for t, row in truth.items() if row["label"] == label and (t in copied) == want]  # noqa: E731
    return {
        "global, copied": of("global", True),
        "global, not copied": of("global", False),
        "local, copied": of("local", True),
        "local, not copied": of("local", False),
        "never seen": of("none", False),
    }


def print_verdicts(verdicts: dict[str, str], truth: dict[str, dict], done: ConfirmSummary) -> None:
    null = done.null
    print(f"  local threshold {null['threshold']:.4g} [{null['low']}, {null['high']}], {null['pictures']} pictures")
    for name, captions in groups(truth).items():
        found = [verdicts[caption] for caption in captions if caption in verdicts]
        counts = {verdict: found.count(verdict) for verdict in ("global", "local", "none")}
        flagged = counts["global"] + counts["local"]
        low, high = share_interval(flagged, len(found))
        text = "  ".join(f"{verdict} {count:>3}" for verdict, count in counts.items())
        print(f"  {name:<20} {text}   flagged {flagged / max(len(found), 1):6.1%} [{low:.1%}, {high:.1%}]")


def print_scores(run: Run, truth: dict[str, dict]) -> None:
    """AUC of every match score, copied against never seen; of a caption the mean over images of the best match."""
    rows = read_stage(run, "confirm", ["caption", "matches"]).to_pylist()
    for label in ("local", "global"):
        names = groups(truth)
        wanted = {**dict.fromkeys(names[f"{label}, copied"], 1), **dict.fromkeys(names["never seen"], 0)}
        kept = [row for row in rows if row["caption"] in wanted]
        labels = np.array([wanted[row["caption"]] for row in kept])
        clusters = [truth[row["caption"]]["cluster"] for row in kept]
        for score in SCORES:
            values = np.array([best_mean(row["matches"], score) for row in kept])
            low, high = cluster_bootstrap(auc, values, labels, clusters)
            print(f"  {label:<7} {score:<10} AUC {auc(values, labels):.3f} [{low:.3f}, {high:.3f}]")


def best_mean(matches: list[dict], score: str) -> float:
    """Best value of a score among an image's matches, averaged over images."""
    best: dict[int, float] = {}
    for match in matches:
        value = match[score]
        if value is not None:
            best[match["image_index"]] = max(best.get(match["image_index"], -np.inf), value)
    return float(np.mean(list(best.values()))) if best else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-bench-confirm")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--none", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="a handful of captions and steps: does it run?")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    captions, run_folder, index = args.work / "captions.parquet", str(args.work / "run"), str(args.work / "index")
    pq.write_table(choose(10 if args.quick else args.none, 1 if args.quick else 8), captions)
    steps = 3 if args.quick else 50
    scan(ScanConfig(captions=(str(captions),), output=run_folder, model="testbed", steps=steps, keep_cols=("URL",)))
    build_index(IndexConfig(images=(str(testbed.PICTURES),), output=index, sscd="testbed"))
    run = Run.open(run_folder)
    truth = {row["TEXT"]: row for row in pq.read_table(captions).to_pylist()}
    for mask in ("energy", "final", "first"):
        for fpr in (0.05, 0.01):
            done = confirm(
                ConfirmConfig(
                    run=run_folder,
                    index=index,
                    top_fraction=1.0,
                    num_images=args.num_images,
                    match_mask=mask,
                    match_fpr=fpr,
                    replace=True,
                )
            )
            table = read_stage(run, "confirm", ["caption", "verdict"])
            verdicts = dict(zip(table["caption"].to_pylist(), table["verdict"].to_pylist(), strict=True))
            print(f"--match-mask {mask} --match-fpr {fpr} --num-images {args.num_images}")
            print_verdicts(verdicts, truth, done)
    print_scores(run, truth)


if __name__ == "__main__":
    main()
