"""The paper's detection and evaluation tables, and all detectors at the first step, on the testbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.index import Index, IndexConfig, build_index
from audit.verdicts.compare import Neighbour, References, match_image
from pipelines import formulas
from pipelines.attention import TOKENS
from tests.benchmarks import published
from tests.benchmarks.tables_page import Page, Row, as_row, better_or_worse, between, figure
from tests.benchmarks.tables_passes import Arrays, Passes, choose, detectors

EOS = TOKENS.index("eos")
TRUTHS = {"design label": "by design label", "measured copying": "by what is measured to be copied"}
MATCH_SCORES = ("sscd", "s", "ls", "ls_norm", "ls_energy", "ls_score", "ls_corr")


def sample_of(frame: pd.DataFrame, truth: str, kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows of a comparison, and which of them count as memorised: kind (local, global) against never seen.

    By measured copying, captions that training repeated and the model does not copy are left out of both.
    """
    of_kind = (frame.label == kind).to_numpy()
    memorised = of_kind & frame.copied.to_numpy() if truth == "measured copying" else of_kind
    rows = memorised | (frame.label == "none").to_numpy()
    return rows, memorised


def masks_by_name(passes: Passes, first: Arrays, whole: Arrays) -> dict[str, NDArray[np.float32]]:
    """The masks a run stores, [N, H, W]: be_mask, first_mask, energy_mask, score_map."""
    last = torch.from_numpy(whole["energy_t"][:, -1])
    noise = passes.model.levels(passes.steps)[-1].noise
    return {
        "be_mask": whole["masks"][:, EOS, passes.paper].astype(np.float32).mean(1),
        "first_mask": first["masks"][:, EOS, passes.paper].astype(np.float32).mean(1),
        "energy_mask": formulas.energy_mask(torch.from_numpy(first["energy"])).numpy(),
        "score_map": formulas.score_difference_map(last, noise).numpy(),
    }


def ld(energy: Any, mask: Any) -> NDArray[np.float32]:
    """`pipelines.formulas.ld` on arrays."""
    return formulas.ld(torch.from_numpy(np.asarray(energy)), torch.from_numpy(np.asarray(mask))).numpy()


def detection(page: Page, passes: Passes, first: Arrays, whole: Arrays) -> list[Row]:
    """Table 1: magnitude against LD in three windows. Returns its rows."""
    frame, masks, energy = passes.frame, masks_by_name(passes, first, whole), whole["energy_t"]
    magnitude = formulas.magnitude(torch.from_numpy(energy)).numpy()
    under_be = ld(energy, masks["be_mask"][:, None])
    windows = {"first step": slice(0, 1), "first 10": slice(0, 10), "all": slice(0, None)}
    scores: list[tuple[str, str, Any]] = []
    for window, part in windows.items():
        scores += [
            ("magnitude", window, magnitude[:, part].mean(1)),
            ("LD, BE mask", window, under_be[:, part].mean(1)),
        ]
    names = {"first_mask": "LD, EOS mask of the first step", "energy_mask": "LD, energy mask (`ld_energy`)"}
    names["score_map"] = "LD, score-difference map"
    scores += [(name, "first step", ld(energy[:, 0], masks[mask])) for mask, name in names.items()]
    rows = []
    for truth in TRUTHS:
        for name, window, values in scores:
            for kind in ("local", "global"):
                kept, memorised = sample_of(frame, truth, kind)
                baseline = magnitude[:, windows[window]].mean(1)
                found = figure(name, kind, values[kept], memorised[kept], baseline[kept], frame.cluster[kept])
                rows.append(as_row(found, truth=truth, window=window))
    page.text("## 1. Detection: magnitude against LD")
    page.text(
        "The paper's first-step LD is the row *LD, BE mask, first step*: the difference of the first step under the "
        "mask "
        "of the final one. *gain* is the AUC minus that of magnitude in the same window, paired over the same "
        "resamples."
    )
    _by_truth(page, "detection", rows, lambda row: f"{row['score']}, {row['window']}", "magnitude")
    published.published_detection(page)
    return rows


def evaluation(page: Page, passes: Passes, first: Arrays, whole: Arrays, work: Path) -> list[Row]:
    """Table 2: SSCD, S and LS of the generations against the training pictures. Returns its rows."""
    frame, best = passes.frame, matches(passes, first, whole, work)
    rows = []
    for truth in TRUTHS:
        for name in MATCH_SCORES:
            for kind in ("local", "global"):
                kept, memorised = sample_of(frame, truth, kind)
                args = (memorised[kept], best["s"][kept], frame.cluster[kept])
                rows.append(as_row(figure(name, kind, best[name][kept], *args), truth=truth))
    page.text("## 2. Evaluation: SSCD, S and LS")
    page.text(
        "Every generation against its 10 nearest training pictures by the testbed's copy descriptor (the real SSCD "
        "is made "
        "for photographs) and the caption's own; the best value counts. `ls` is as printed in the paper, `ls_norm` is "
        "divided by mean(m), `ls_energy` and `ls_score` are `ls_norm` under the energy mask and the "
        "score-difference map, `ls_corr` is the correlation distance under the energy mask. "
        "*gain* is against S."
    )
    _by_truth(page, "evaluation", rows, lambda row: f"`{row['score']}`", "s")
    page.text("On Stable Diffusion no published figures of LS were found outside Chen et al. 2025 itself.")
    return rows


def matches(passes: Passes, first: Arrays, whole: Arrays, work: Path) -> Arrays:
    """Best value of every match score of each generation, [N] each."""
    path = str(work / "index")
    build_index(IndexConfig(images=(str(testbed.PICTURES),), output=path, sscd="testbed"))
    index = Index.open(path)
    vectors = index.load_descriptor(None, "cpu")(list(whole["images"])).numpy()
    ids, cosines = index.search(vectors, 10)
    own = index.own([("url", passes.frame.URL.tolist()), ("caption", passes.frame.TEXT.tolist())])
    references, masks = References(index, whole["images"].shape[1:3]), masks_by_name(passes, first, whole)
    best: dict[str, list[float]] = {name: [] for name in MATCH_SCORES}
    nothing = dict.fromkeys(("key", "url", "caption"))
    for row, image in enumerate(whole["images"]):
        near = [
            Neighbour(int(id), float(cosine), rank)
            for rank, (id, cosine) in enumerate(zip(ids[row], cosines[row], strict=True))
        ]
        if own[row] is not None and own[row] not in ids[row]:
            near.append(Neighbour(own[row], float(index.vectors([own[row]])[0] @ vectors[row]), -1))
        facts = {id: nothing for id, _, _ in near}
        at = {name: values[row] for name, values in masks.items()}
        found = match_image(image, 0, at, near, own[row], references, facts)
        for name in MATCH_SCORES:
            best[name].append(max(match[name] for match in found))
    return {name: np.array(values) for name, values in best.items()}


def all_detectors(page: Page, passes: Passes, seconds: dict[str, float], quick: bool) -> list[Row]:
    """Table 4: every first-step column, on all captions of the testbed that are memorised or never seen."""
    frame = passes.frame if quick else choose(8, 10_000)
    columns = detectors(frame.TEXT.tolist(), passes)
    cost = {"ld_energy": (1, "energy"), "cosine_low": (2, "extra"), "anisotropy": (2, "extra")}
    rows = []
    for truth in TRUTHS:
        for name in (
            "magnitude",
            "ld",
            "ld_energy",
            "webster",
            "attention_entropy",
            "cosine",
            "cosine_low",
            "anisotropy",
        ):
            evaluations, timing = cost.get(name, (1, "first"))
            for kind in ("local", "global"):
                kept, memorised = sample_of(frame, truth, kind)
                args = (memorised[kept], columns["magnitude"][kept], frame.cluster[kept])
                found = figure(name, kind, columns[name][kept], *args)
                extra = {"evaluations": evaluations, "milliseconds": 1000 * seconds[timing]}
                rows.append(as_row(found, truth=truth, **extra, published_sd14=published.DETECTORS.get(name, "")))
    page.text("## 4. All detectors at the first step")
    page.text(
        "One noise. `ld` has the EOS mask of the first step (`--mask first`), `cosine_low` and `anisotropy` need "
        "`--extra-evaluation`. U-Net evaluations and milliseconds (one thread) are those a caption costs the scorer "
        "that gives the "
        "column: all columns of one evaluation come together, so their cost is the same. *gain* is against magnitude."
    )
    cost_columns = {
        "evaluations": lambda row: f"{row['evaluations']}",
        "ms / caption": lambda row: f"{row['milliseconds']:.0f}",
    }
    _by_truth(page, "detectors", rows, lambda row: f"`{row['score']}`", "magnitude", cost_columns)
    figures = "; ".join(f"`{name}` {each}" for name, each in published.DETECTORS.items())
    page.text(
        "For orientation, published AUC / TPR@1%FPR of the same scores on **Stable Diffusion 1.4**, with other "
        "captions "
        f"and not comparable with the testbed's: {figures}."
    )
    return rows


def _by_truth(page: Page, name: str, rows: list[Row], label: Any, baseline: str, more: Any = None) -> None:
    """A Markdown table a truth and kind, one CSV for all of them; then what the gains say."""
    for truth, words in TRUTHS.items():
        for kind in ("local", "global"):
            part = [row for row in rows if row["truth"] == truth and row["type"] == kind]
            page.text(f"**{kind}, {words}** ({part[0]['memorised']} memorised, {part[0]['clean']} never seen)")
            page.table(name, rows, {
                "score": label,
                **(more or {}),
                "AUC": lambda row: between(row, "auc"),
                "best F1": lambda row: between(row, "f1"),
                "TPR@1%FPR": lambda row: between(row, "tpr_1"),
                "gain": lambda row: "" if row["score"] == baseline else between(row, "gain", "+.3f"),
            }, lambda row, t=truth, k=kind: row["truth"] == t and row["type"] == k)  # fmt: skip
            page.parts.pop()  # the link to the CSV, once below
    page.text(f"[tables/{name}.csv](tables/{name}.csv)")
    for verdict in ("better", "worse"):
        found = [f"{label(row)} ({row['type']}, {row['truth']})" for row in rows if _verdict(row, baseline) == verdict]
        page.text(
            f"Against `{baseline}`, by the 95 % interval of the gain, **{verdict}**: {'; '.join(found) or 'none'}. "
            + ("The others are not told apart." if verdict == "worse" else "")
        )


def _verdict(row: Row, baseline: str) -> str:
    return "itself" if row["score"] == baseline else better_or_worse(row)
