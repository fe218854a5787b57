"""The paper's detection and evaluation tables, what several noises are worth, and all detectors at the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.captions.sample import SAMPLE
from audit.index import Index, IndexConfig, build_index
from audit.statistics.metrics import auc
from audit.verdicts.compare import Neighbour, References, match_image
from pipelines import formulas
from pipelines.attention import TOKENS
from tests.benchmarks import published
from tests.benchmarks.tables_noises import excess, excess_pca, figure
from tests.benchmarks.tables_page import Page, Row, better_or_worse, between
from tests.benchmarks.tables_passes import COLUMNS, EXTRA_COLUMNS, Arrays, Passes

EOS = TOKENS.index("eos")
TRUTHS = {"design label": "by design label", "measured copying": "by what is measured to be copied"}
MATCH_SCORES = ("sscd", "s", "ls", "ls_norm", "ls_energy", "ls_score", "ls_corr")


def sample_of(frame: pd.DataFrame, truth: str, kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows of a comparison, and which of them count as memorised: kind (local, global) against clean.

    By measured copying, captions that training repeated and the model does not copy are left out of both. Captions of
    the null sample of `excess` are in neither.
    """
    of_kind = (frame.label == kind).to_numpy()
    memorised = of_kind & frame.copied.to_numpy() if truth == "measured copying" else of_kind
    rows = memorised | ((frame.label == "none") & ~frame.null).to_numpy()
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


def magnitude(energy: Any) -> NDArray[np.float32]:
    """`pipelines.formulas.magnitude` on arrays."""
    return formulas.magnitude(torch.from_numpy(np.asarray(energy))).numpy()


def energies(differences: NDArray[np.float32]) -> NDArray[np.float32]:
    """`pipelines.formulas.energy_map` of noise differences [noises, N, C, H, W]."""
    return np.stack([formulas.energy_map(torch.from_numpy(each)).numpy() for each in differences])


def energy_scores(differences: NDArray[np.float32], null: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The scores that rest on the noise difference of the first step alone, [noises, N] each.

    Args:
        differences: [noises, N, C, H, W]. null: those of the captions that say what is usual.
    """
    energy, usual = energies(differences), energies(null)
    under = [ld(each, formulas.energy_mask(torch.from_numpy(each)).numpy()) for each in energy]
    return {
        "magnitude": magnitude(energy),
        "ld_energy": np.stack(under),
        "excess, window of 3": excess(energy, usual, (3,)),
        "excess, four windows": excess(energy, usual),
        "excess_pca": excess_pca(differences, null),
    }


def several_noises(page: Page, frame: pd.DataFrame, scores: dict[str, NDArray[Any]], null: int) -> list[Row]:
    """Table 1: what the scores of the noise difference find with 1, 2, 4 and 8 noises. Returns its rows.

    Args:
        scores: of `energy_scores`. null: how many captions say what is usual.
    """
    counts = [count for count in (1, 2, 4, 8) if count <= len(scores["magnitude"])]
    rows = []
    for kind in ("local", "global"):
        kept, memorised = sample_of(frame, "measured copying", kind)
        for count in counts:
            for reduce in ("mean", "max")[: 1 if count == 1 else 2]:
                for name, values in scores.items():
                    base = scores["magnitude"][:, kept]
                    args = (memorised[kept], base, frame.cluster[kept], count, reduce)
                    rows.append({**figure(name, kind, values[:, kept], *args), "truth": "measured copying"})
    page.text("## 1. How many noises?")
    clean = int(sample_of(frame, "measured copying", "local")[0].sum()) - rows[0]["memorised"]
    words = _clean_words(frame, scores)
    page.text(
        f"Scores of the first step's noise difference alone, with {clean} clean captions, of which {int(clean * 0.01)} "
        f"may be flagged at an FPR of 1 % and {int(clean * 0.001)} at 0.1 %. `excess` is the largest cell of the log "
        "energy map, smoothed by a 3 x 3 mean (*four windows*: by 3, 5 and 9 cells and the whole map), standardised "
        f"per noise and cell by the median and upper spread (84 % quantile minus median) over {null} other captions "
        "that the model never saw, which are counted nowhere else; `excess_pca` is the largest cell of the energy map "
        "of what is left without their common part, its settings once looked for on these captions and on another "
        f"model (docs/detection.md).{words} Several noises count by their mean or their maximum. *gain* is against "
        "magnitude under the first of a draw's noises. U-Net evaluations: one a caption and noise; the unconditional "
        "one of every noise is shared by all captions, and the null maps of `excess` and `excess_pca` take those of "
        f"their sample, {SAMPLE} a noise, once a run."
    )
    _by_truth(page, "noises", rows, lambda row: f"{row['score']}, {_noises(row)}", "")
    return rows


def several(noises: int) -> list[tuple[int, str]]:
    """How many noises of a caption count, and by what: one; four, where there are so many."""
    return [(1, "mean"), *([(4, "mean"), (4, "max")] if noises >= 4 else [])]


def _noises(row: Row) -> str:
    return "1 noise" if row["noises"] == 1 else f"{row['over_noises']} of {row['noises']}"


def _clean_words(frame: pd.DataFrame, scores: dict[str, NDArray[Any]]) -> str:
    """Do captions that training saw once score as those it never saw?"""
    none, seen = (frame.label == "none") & ~frame.null, frame.cluster.str.startswith("seen")
    kept, is_seen = none.to_numpy(), (none & seen).to_numpy()
    if not is_seen.any():
        return ""
    found = [
        f"{name} {np.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f})"
        for name in ("magnitude", "ld_energy")
        if (aucs := [auc(values[kept], is_seen[kept]) for values in scores[name]])
    ]
    return (
        f" Captions that training saw once ({is_seen.sum()}) count as clean beside those it never saw "
        f"({kept.sum() - is_seen.sum()}): no score tells the two apart (AUC, mean over noises and least to most: "
        f"{', '.join(found)})."
    )


def detection(page: Page, frame: pd.DataFrame, passes: Passes, first: list[Arrays], whole: list[Arrays]) -> list[Row]:
    """Table 4: magnitude against LD in three windows. Returns its rows."""
    masks = [masks_by_name(passes, *each) for each in zip(first, whole, strict=True)]
    energy = [each["energy_t"] for each in whole]
    by_step = np.stack([magnitude(each) for each in energy])
    under_be = np.stack([ld(each, mask["be_mask"][:, None]) for each, mask in zip(energy, masks, strict=True)])
    windows = {"first step": slice(0, 1), "first 10": slice(0, 10), "all": slice(0, None)}
    whole_cost = 2 * passes.steps
    scores: list[tuple[str, str, Any, int]] = []
    for window, part in windows.items():
        cost = 1 if window == "first step" else whole_cost
        scores.append(("magnitude", window, by_step[..., part].mean(2), cost))
        scores.append(("LD, BE mask", window, under_be[..., part].mean(2), whole_cost))
    names = {"first_mask": "LD, EOS mask of the first step", "energy_mask": "LD, energy mask (`ld_energy`)"}
    names["score_map"] = "LD, score-difference map"
    for mask, name in names.items():
        values = np.stack([ld(each[:, 0], of[mask]) for each, of in zip(energy, masks, strict=True)])
        scores.append((name, "first step", values, whole_cost if mask == "score_map" else 1))
    rows = []
    for name, window, values, cost in scores:
        for kind in ("local", "global"):
            kept, memorised = sample_of(frame, "measured copying", kind)
            baseline = by_step[:, kept, windows[window]].mean(2)
            for draws, reduce in several(len(values)):
                args = (memorised[kept], baseline, frame.cluster[kept], draws, reduce)
                found = figure(name, kind, values[:, kept], *args)
                rows.append({**found, "truth": "measured copying", "window": window, "evaluations": draws * cost})
    page.text("## 4. Detection: magnitude against LD")
    page.text(
        "The paper's first-step LD is the row *LD, BE mask, first step*: the difference of the first step under the "
        "mask of the final one. *gain* is the AUC minus that of magnitude in the same window and under the first of a "
        "draw's noises."
    )
    _by_truth(
        page, "detection", rows, lambda row: f"{row['score']}, {row['window']}, {_noises(row)}", "magnitude", COST
    )
    published.published_detection(page)
    return rows


COST = {"evaluations": lambda row: f"{row['evaluations']}"}


def evaluation(
    page: Page, frame: pd.DataFrame, passes: Passes, first: list[Arrays], whole: list[Arrays], work: Path
) -> list[Row]:
    """Table 5: SSCD, S and LS of the generations against the training pictures. Returns its rows."""
    path = str(work / "index")
    build_index(IndexConfig(images=(str(testbed.PICTURES),), output=path, sscd="testbed"))
    index = Index.open(path)
    each = [matches(frame, passes, *of, index) for of in zip(first, whole, strict=True)]
    best = {name: np.stack([found[name] for found in each]) for name in MATCH_SCORES}
    rows = []
    for name, values in best.items():
        for kind in ("local", "global"):
            kept, memorised = sample_of(frame, "measured copying", kind)
            for draws, reduce in several(len(whole)):
                args = (memorised[kept], best["s"][:, kept], frame.cluster[kept], draws, reduce)
                found = figure(name, kind, values[:, kept], *args)
                rows.append({**found, "truth": "measured copying", "evaluations": 2 * passes.steps * draws})
    page.text("## 5. Evaluation: SSCD, S and LS")
    page.text(
        "Every generation against its 10 nearest training pictures by the testbed's copy descriptor (the real SSCD "
        "is made for photographs) and the caption's own; the best value counts, of several images their mean or best. "
        "`ls` is as printed in the paper, `ls_norm` is divided by mean(m), `ls_energy` and `ls_score` are `ls_norm` "
        "under the energy mask and the score-difference map, `ls_corr` is the correlation distance under the energy "
        "mask. *gain* is against S of one image."
    )
    _by_truth(page, "evaluation", rows, lambda row: f"`{row['score']}`, {_noises(row)}", "s", COST)
    published.published_evaluation(page)
    return rows


def matches(frame: pd.DataFrame, passes: Passes, first: Arrays, whole: Arrays, index: Index) -> Arrays:
    """Best value of every match score of each generation, [N] each."""
    vectors = index.load_descriptor(None, "cpu")(list(whole["images"])).numpy()
    ids, cosines = index.search(vectors, 10)
    own = index.own([("url", frame.URL.tolist()), ("caption", frame.TEXT.tolist())])
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


def all_detectors(
    page: Page, frame: pd.DataFrame, columns: list[Arrays], extra: list[Arrays], of_run: dict[str, NDArray[Any]]
) -> list[Row]:
    """Table 3: every first-step column of a scan of one noise, and of four. Returns its rows.

    Args:
        of_run: of `energy_scores`; those that are measured against other captions are taken.
    """
    scores = {name: np.stack([each[name] for each in columns]) for name in COLUMNS}
    scores |= {"excess": of_run["excess, four windows"], "excess_pca": of_run["excess_pca"]}
    scores |= {name: np.stack([each[name] for each in extra]) for name in EXTRA_COLUMNS if extra}
    rows = []
    for truth in TRUTHS:
        for name, values in scores.items():
            for kind in ("local", "global"):
                kept, memorised = sample_of(frame, truth, kind)
                for draws, reduce in several(len(values)):
                    base = scores["magnitude"][: len(values), kept]
                    args = (memorised[kept], base, frame.cluster[kept], draws, reduce)
                    found = figure(name, kind, values[:, kept], *args)
                    cost = draws * (2 if name in EXTRA_COLUMNS else 1)
                    more = {"truth": truth, "evaluations": cost, "published_sd14": published.DETECTORS.get(name, "")}
                    rows.append(found | more)
    page.text("## 3. All detectors at the first step")
    page.text(
        "`ld` has the EOS mask of the first step (`--mask first`), `cosine_low` and `anisotropy` need "
        "`--extra-evaluation`, `excess` and `excess_pca` have the null maps of table 1. All columns of one evaluation "
        "come together. *gain* is against magnitude under the first of a draw's noises."
    )
    _by_truth(page, "detectors", rows, lambda row: f"`{row['score']}`, {_noises(row)}", "", COST)
    figures = "; ".join(f"`{name}` {each}" for name, each in published.DETECTORS.items())
    page.text(
        "For orientation, published AUC / TPR@1%FPR of the same scores on **Stable Diffusion 1.4**, with other "
        f"captions and not comparable with the testbed's: {figures}."
    )
    return rows


def _by_truth(page: Page, name: str, rows: list[Row], label: Any, baseline: str, more: Any = None) -> None:
    """A Markdown table a truth and kind, one CSV for all rows; then what the gains say."""
    cost = more or {"evaluations": lambda row: f"{row['noises']}"}
    for truth, words in TRUTHS.items():
        for kind in ("local", "global"):
            part = [row for row in rows if row["truth"] == truth and row["type"] == kind]
            if not part:
                continue
            page.text(f"**{kind}, {words}** ({part[0]['memorised']} memorised, {part[0]['clean']} clean)")
            page.table(name, rows, {
                "score": label,
                **cost,
                "AUC": lambda row: between(row, "auc"),
                "TPR@1%FPR": lambda row: between(row, "tpr_1"),
                "TPR@0.1%FPR": lambda row: between(row, "tpr_01"),
                "best F1": lambda row: between(row, "f1"),
                "gain": lambda row: "" if is_baseline(row, baseline) else between(row, "gain", "+.3f"),
            }, lambda row, t=truth, k=kind: (row["truth"], row["type"]) == (t, k))  # fmt: skip
            page.parts.pop()  # the link to the CSV, once below
    page.text(f"[tables/{name}.csv](tables/{name}.csv)")
    for verdict in ("better", "worse"):
        found = [
            f"{label(row)} ({row['type']}, {row['truth']})"
            for row in rows
            if not is_baseline(row, baseline) and better_or_worse(row) == verdict
        ]
        page.text(
            f"By the 95 % interval of the gain **{verdict}**: {'; '.join(found) or 'none'}. "
            + ("The others are not told apart." if verdict == "worse" else "")
        )


def is_baseline(row: Row, baseline: str) -> bool:
    """The row that gains are measured against: the named score, or magnitude, under one noise."""
    return row["score"] == (baseline or "magnitude") and row["noises"] == 1
