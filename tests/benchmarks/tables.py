"""The paper's tables on the testbed, all detectors and all masks, as two pages with CSV and PNG beside.

    python -m tests.benchmarks.tables [--page PAGE] [--work DIR] [--output DIR] [--quick]

docs/tables.md is of the first step, docs/tables-trajectories.md of whole trajectories, which cost a hundred times as
much. Every figure is over a bank of noises. What the model computes is kept in --work and made once. Same seeds, same
figures. The testbed is small and not Stable Diffusion.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from audit.captions.sample import SAMPLE
from audit.reports.pictures import REGION
from tests.benchmarks.tables_masks import FEW, attention_per_step, mask_quality, mask_question
from tests.benchmarks.tables_page import Page, Row, better_or_worse, between
from tests.benchmarks.tables_passes import NOISES, SEED, Passes, choose, many, null_captions
from tests.benchmarks.tables_regions import shown_region
from tests.benchmarks.tables_scores import all_detectors, detection, energies, energy_scores, evaluation, several_noises

DOCS = Path(__file__).parents[2] / "docs"


def first_step_page(output: Path, work: Path, quick: bool) -> Path:
    """Tables 1 to 3, tables.md: how many noises, which region to show, all columns of the first step.

    Args:
        quick: few captions, noises and steps, to see that it runs.
    """
    passes, page = Passes(work, 4 if quick else 50, 2 if quick else NOISES), Page(output)
    many_captions = many(1, 320, 8, 8) if quick else many(4, 499, 370, 240)
    samples = {"tables 1 and 2": many_captions, "table 3": choose(2, 48, 220)}
    if quick:
        samples = {name: _thinned(frame) for name, frame in samples.items()}
    page.text("# The paper's tables on the testbed: the first step")
    introduction(page, passes, "first", quick, "samples", samples)
    page.text("Tables 4 to 8, of whole trajectories, are in [tables-trajectories.md](tables-trajectories.md).")
    at = len(page.parts)

    wide, narrow = samples.values()
    nulls = null_captions([wide, narrow], 16 if quick else SAMPLE)
    null = np.stack(passes.over(passes.difference, nulls))
    differences = np.stack(passes.over(passes.difference, wide.TEXT))
    said = about_noises(several_noises(page, wide, energy_scores(differences, null), len(nulls)))
    said += about_regions(shown_region(page, wide, energies(differences)))
    of_run = energy_scores(np.stack(passes.over(passes.difference, narrow.TEXT)), null)
    extra = passes.over(lambda captions, noise: passes.columns(captions, noise, True), narrow.TEXT)
    columns = passes.over(passes.columns, narrow.TEXT)
    said += about_detectors(all_detectors(page, narrow, columns, extra, of_run))
    page.parts[at:at] = ["## What the tables say", "\n".join(said)]
    return page.write("tables.md")


def trajectories_page(output: Path, work: Path, quick: bool) -> Path:
    """Tables 4 to 8, tables-trajectories.md: the paper's tables over whole trajectories, masks, attention per step."""
    passes, page = Passes(work, 4 if quick else 50, 2 if quick else NOISES), Page(output)
    few = choose(1, 10, 100)
    frame = few[few.copied | (few.label == "none")].reset_index(drop=True)
    frame = _thinned(frame) if quick else frame
    page.text("# The paper's tables on the testbed: whole trajectories")
    introduction(page, passes, "trajectories", quick, "samples_trajectories", {"tables 4 to 8": frame})
    page.text("Tables 1 to 3, of the first step alone, are in [tables.md](tables.md).")
    at = len(page.parts)

    first, low, whole = (passes.over(make, frame.TEXT) for make in (passes.first, passes.low, passes.whole))
    last = passes.over(lambda captions, noise: passes.few(captions, noise, FEW), frame.TEXT)
    found = detection(page, frame, passes, first, whole)
    evaluation(page, frame, passes, first, whole, work)
    said = about_paper(found, mask_quality(page, frame, passes, first, low, last, whole))
    said += about_masks(mask_question(page, frame, passes, first, low, last, whole))
    attention_per_step(page, frame, whole)
    page.parts[at:at] = ["## What the tables say", "\n".join(said)]
    return page.write("tables-trajectories.md")


PAGES = {"first": first_step_page, "trajectories": trajectories_page}


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """Two captions of every kind."""
    return frame.groupby(["label", "common", "copied", "half", "null"]).head(2).reset_index(drop=True)


def introduction(
    page: Page, passes: Passes, name: str, quick: bool, table: str, samples: dict[str, pd.DataFrame]
) -> None:
    """What was measured, on what, with what, when."""
    machine = f"{os.cpu_count()} CPU cores" + ("" if torch.cuda.is_available() else ", no GPU")
    page.text(
        f"Written by `python -m tests.benchmarks.tables --page {name}`"
        f"{' (--quick: too little to mean anything)' if quick else ''} on {machine}, {datetime.date.today()}, with the "
        f"embedded testbed: {passes.steps} steps, guidance 7.5, float32, {len(passes.bank)} noises, the bank of seed "
        f"{SEED}."
    )
    rows = []
    for name, frame in samples.items():
        starts, null = frame.cluster.str.startswith, frame.null
        row: Row = {"captions of": name}
        for label in ("global", "local"):
            of = frame.label == label
            row[f"{label} (copied)"] = f"{int(of.sum())} ({int((of & frame.copied).sum())})"
        row |= {"never seen": int((starts("unseen") & ~null).sum()), "seen once": int((starts("seen") & ~null).sum())}
        rows.append(row)
    page.table(table, rows, {name: lambda row, n=name: str(row[n]) for name in rows[0]})
    page.text(
        "**The testbed is a small model trained for this project and is not Stable Diffusion: nothing here is a claim "
        "about Stable Diffusion.** Its templates are few (32, of which 19 are copied, 3 of these with a small region), "
        "so intervals are wide. *By design label* is what training repeated, *by what is measured to be copied* what "
        "the model really reproduces (`copy_error` under 0.15). A figure is the mean over the noises; in parentheses "
        "the least and the most of them; in brackets a 95 % bootstrap interval over clusters (templates) and noises "
        "together: how a scan of that many noises may differ. An interval without width means that every resample was "
        "perfect (or zero), not that nothing is uncertain. A flag is `score > threshold`; TPR@1%FPR is the largest TPR "
        "whose FPR is at most 1 %, nothing interpolated: with fewer than 100 (1,000 for 0.1 %) clean captions not one "
        "may be flagged. *evaluations* are those of the U-Net that a caption costs as the scan makes them. Figures of "
        "other models stand in tables of their own, labelled as published."
    )


def about_noises(rows: list[Row]) -> list[str]:
    """The sentences people read first, made from the figures: of one noise and of several."""
    said = []
    for count in dict.fromkeys((1, min(4, max(row["noises"] for row in rows)))):
        for kind in ("local", "global"):
            part = [row for row in rows if (row["type"], row["noises"], row["over_noises"]) == (kind, count, "mean")]
            figures = "; ".join(
                f"{row['score']}: AUC {between(row, 'auc')}, TPR@1%FPR {between(row, 'tpr_1')}, TPR@0.1%FPR "
                f"{between(row, 'tpr_01')}"
                for row in part
            )
            said.append(
                f"- **{'One noise' if count == 1 else f'The mean of {count} noises'}, copied {kind} captions.** "
                f"{figures}."
            )
    return said


def about_regions(rows: list[Row]) -> list[str]:
    """Of table 2."""
    best = next(row for row in rows if row["chosen"] and row["noises"] == "one")
    mean = next(row for row in rows if (row["noises"], row["smoothing"], row["threshold"]) == ("one", 3, "mean"))
    return [
        f"- **The region to show.** Of the energy masks of one noise, smoothed 3 x 3, cut at *{best['threshold']}* is "
        f"best on the choosing half; on the other half and the other noises its IoU is {between(best, 'report_iou')}, "
        f"cut at the mask's own mean {between(mean, 'report_iou')}. The report cuts at {REGION:g} x mean.",
    ]


def about_detectors(rows: list[Row]) -> list[str]:
    """Of table 3."""
    part = [row for row in rows if (row["truth"], row["type"], row["noises"]) == ("measured copying", "local", 1)]
    best = max((row for row in part if row["evaluations"] == 1), key=lambda row: row["auc"])
    return [
        f"- **The best column of one evaluation** on copied local captions is `{best['score']}`: AUC "
        f"{between(best, 'auc')}, gain over magnitude {between(best, 'gain', '+.3f')}. Every template counts here, "
        "those that settings were once looked for on among them, and what is usual is of captions never seen; of half "
        "of the templates and a sample as a scan takes it: [detection.md](detection.md)."
    ]


def about_paper(found: list[Row], quality: list[Row]) -> list[str]:
    """Of tables 4 and 6."""
    one = (row for row in found if (row["type"], row["noises"]) == ("local", 1))
    copied = {(row["score"], row["window"]): row for row in one}
    paper, base = copied["LD, BE mask", "first step"], copied["magnitude", "first step"]
    at = {row["mask"]: row["pixel_auc"] for row in quality if row["templates"] == "all"}

    def by_window(score: str) -> str:
        aucs = {window: copied[score, window]["auc"] for window in ("first step", "first 10", "all")}
        return f"{score} has AUCs of {', '.join(f'{auc:.3f} ({window})' for window, auc in aucs.items())}"

    beats = {"better": "beats", "worse": "does worse than"}.get(better_or_worse(paper), "is not told apart from")
    return [
        f"- **The paper's first-step LD {beats} magnitude here** on copied local captions: AUC {between(paper, 'auc')} "
        f"against {between(base, 'auc')}, gain {between(paper, 'gain', '+.3f')}. What is known of why: the BE mask of "
        f"the paper's two layers has a pixel AUC of {at['BE (EOS, final step)']:.3f} against the true regions in this "
        f"model, the energy mask of the first step {at['energy mask, first step']:.3f}, the score-difference map "
        f"{at['score-difference map, final step']:.3f}; LD weighs the noise difference by where the mask points. By "
        f"window, {by_window('magnitude')}; {by_window('LD, BE mask')}."
    ]


def about_masks(rows: list[Row]) -> list[str]:
    """Of table 7."""
    single = [row for row in rows if row["evaluations"] == 1]
    best = max(single, key=lambda row: (row["choose_auc"], row["choose_pixel_auc"]))
    default = next(row for row in rows if row["mask"] == "energy, first step: smoothing 3, power 1")
    return [
        f"- **The mask at one evaluation.** Best on the choosing half is *{best['mask']}*; on the other half its LD "
        f"has "
        f"an AUC of {between(best, 'auc')}, that of the 3 x 3 energy mask, which scan uses, {between(default, 'auc')}; "
        f"pixel AUC {best['report_pixel_auc']:.3f} and {default['report_pixel_auc']:.3f}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", choices=[*PAGES, "all"], default="all", help="which of the two pages to write")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-tables")
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument("--quick", action="store_true", help="few captions, noises and steps: does it run?")
    args = parser.parse_args()
    for name, write in PAGES.items():
        if args.page in (name, "all"):
            print(write(args.output, args.work, args.quick), flush=True)


if __name__ == "__main__":
    main()
