"""Which mask points at the true region, and which makes the best score: the paper's third table and beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.evaluation.plots import new_figure, png_of
from audit.statistics.metrics import auc, best_iou, iou_at, tpr_at_fpr
from pipelines import formulas
from pipelines.attention import TOKENS
from tests.benchmarks.published import published_masks
from tests.benchmarks.tables_page import Page, Row, between, figure
from tests.benchmarks.tables_passes import Arrays, Passes
from tests.benchmarks.tables_scores import EOS, TRUTHS, ld, masks_by_name, sample_of

FEW = (2, 4, 8)
PAPER = "the paper's two"
TOKEN_WORDS = {"eos": "EOS", "bos": "1 - BOS", "padding": "EOS and padding"}


@dataclass(frozen=True)
class Variant:
    """One mask: where it is read, which layers and token (or smoothing and power), what a caption costs.

    Attributes:
        evaluations: U-Net evaluations a caption with the mask and the first-step difference, the unconditional one of
            shared noise not counted. timing: key of `Passes.seconds`. masks: [N, H, W].
    """

    source: str
    layers: str
    token: str
    evaluations: int
    timing: str
    masks: NDArray[np.float32]

    @property
    def name(self) -> str:
        return f"{self.source}: {self.layers}, {self.token}"

    @property
    def is_energy(self) -> bool:
        return self.token.startswith("power")


def variants(passes: Passes, first: Arrays, whole: Arrays) -> list[Variant]:
    """Every mask the passes can give."""
    low = passes.low()
    steps = passes.steps
    sources = [("first step", 1, "first", first["masks"]), ("pure noise, low t", 2, "low", low["masks"])]
    sources += [(f"last of {n} steps", 2 * n - 1, f"steps{n}", passes.few(n)["masks"]) for n in FEW]
    sources.append((f"last of {steps} steps", 2 * steps - 2, "whole", whole["masks"]))
    places = {PAPER: passes.paper, **{short(name): [place] for place, name in enumerate(passes.layers)}}
    found = [
        Variant(source, layers, TOKEN_WORDS[token], cost, timing, masks[:, at][:, place].astype(np.float32).mean(1))
        for source, cost, timing, masks in sources
        for at, token in enumerate(TOKENS)
        for layers, place in places.items()
    ]
    energies = [
        ("energy, first step", 1, "energy", first["energy"]),
        ("energy, pure noise, low t", 2, "low", low["energy"]),
        (f"energy, last of {steps} steps (score-difference map)", 2 * steps - 1, "whole", whole["energy_t"][:, -1]),
    ]
    for source, cost, timing, energy in energies:
        for size in (1, 3, 5):
            for power in (0.5, 1.0, 2.0):
                mask = formulas.energy_mask(torch.from_numpy(energy), size).pow(power).numpy()
                found.append(Variant(source, f"smoothing {size}", f"power {power:g}", cost, timing, mask))
    return found


def short(layer: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn2` -> `down 0.1`."""
    parts = layer.split(".")
    return f"{parts[0].split('_')[0]} " + ".".join(part for part in parts[1:4] if part.isdigit())


def localisation(masks: NDArray[np.float32], passes: Passes) -> dict[str, NDArray[np.float64]]:
    """Against the true 64 x 64 regions: pixel AUC, best IoU, IoU above the mask's mean; [N], NaN without a region."""
    regions, frame = testbed.regions(), passes.frame
    large = formulas.resize_mask(torch.from_numpy(masks), (64, 64)).numpy()
    every = np.ones((1, 64 * 64))
    found = {name: np.full(len(frame), np.nan) for name in ("pixel_auc", "best_iou", "iou_at_mean")}
    for row, cluster in enumerate(frame.cluster):
        if cluster in regions:
            # the weighted form of the same figure: `pixel_auc` asks scikit-learn, which takes 50 times as long
            found["pixel_auc"][row] = auc(large[row].ravel(), regions[cluster].ravel(), every)[0]
            found["best_iou"][row] = best_iou(large[row], regions[cluster])[0]
            found["iou_at_mean"][row] = iou_at(large[row], regions[cluster], float(large[row].mean()))
    return found


def mask_quality(page: Page, passes: Passes, first: Arrays, whole: Arrays) -> list[Row]:
    """Table 3: how well the masks one can have cheaply point at the true regions. Returns its rows."""
    frame, stored = passes.frame, masks_by_name(passes, first, whole)
    paper = lambda found: found["masks"][:, EOS, passes.paper].astype(np.float32).mean(1)  # noqa: E731
    masks = {"BE (EOS, final step)": stored["be_mask"], "EOS, first step": stored["first_mask"]}
    masks["EOS, pure noise at low t"] = paper(passes.low())
    masks |= {f"EOS, last of {n} steps": paper(passes.few(n)) for n in FEW}
    masks |= {"score-difference map, final step": stored["score_map"], "energy mask, first step": stored["energy_mask"]}
    local, common = (frame.label == "local").to_numpy(), frame.common.to_numpy()
    rows = []
    for truth in TRUTHS:
        kept = local & frame.copied.to_numpy() if truth == "measured copying" else local
        groups = {"all": kept, "common": kept & common, "rare": kept & ~common}
        for name, mask in masks.items():
            quality = localisation(mask, passes)
            for group, rows_of in groups.items():
                means = {
                    key: float(values[rows_of].mean()) if rows_of.any() else np.nan for key, values in quality.items()
                }
                rows.append({"truth": truth, "mask": name, "templates": group, "captions": int(rows_of.sum()), **means})
    page.text("## 3. Mask quality")
    page.text(
        "The paper's two layers at 64 x 64 against the true fixed regions, means over captions. *best IoU* knows "
        "the best "
        "threshold of each mask, *IoU at mean* cuts at the mask's own mean, as `--store-masks bits` stores it. 0.5 is "
        "the "
        "pixel "
        "AUC of chance. Common templates have 30 to 60 % of the picture fixed, rare ones 7 to 25 %."
    )
    for truth, words in TRUTHS.items():
        counts = {row["templates"]: row["captions"] for row in rows if row["truth"] == truth}
        sizes = ", ".join(f"{count} of {group} templates" for group, count in counts.items())
        page.text(f"**Local, {words}** (captions: {sizes})")
        columns: dict[str, Any] = {"mask": lambda row: row["mask"]}
        at = {(row["mask"], row["templates"]): row for row in rows if row["truth"] == truth}
        for key, title in (("pixel_auc", "pixel AUC"), ("best_iou", "best IoU"), ("iou_at_mean", "IoU at mean")):
            for group in counts:
                columns[f"{title}, {group}"] = lambda row, k=key, g=group, a=at: f"{a[row['mask'], g][k]:.3f}"
        page.table("masks", rows, columns, lambda row, t=truth: row["truth"] == t and row["templates"] == "all")
        page.parts.pop()
    page.text("[tables/masks.csv](tables/masks.csv)")
    published_masks(page)
    return rows


def mask_question(page: Page, passes: Passes, first: Arrays, whole: Arrays, seconds: dict[str, float]) -> list[Row]:
    """Table 5: every mask as the mask of a first-step LD; chosen on half of the templates, reported on the other."""
    frame, half = passes.frame, passes.frame.half.to_numpy()
    magnitude = formulas.magnitude(torch.from_numpy(first["energy"])).numpy()
    rows: list[Row] = []
    for each in variants(passes, first, whole):
        scores, quality = ld(first["energy"], each.masks), localisation(each.masks, passes)
        row: Row = {"mask": each.name, "source": each.source, "layers": each.layers, "token": each.token}
        row |= {"evaluations": each.evaluations, "milliseconds": 1000 * seconds[each.timing], "energy": each.is_energy}
        for truth in TRUTHS:
            words = truth.split()[0]
            for side, part in (("choose", half == 0), ("report", half == 1)):
                kept, memorised = sample_of(frame, truth, "local")
                kept = kept & part
                row[f"{side}_auc_{words}"] = auc(scores[kept], memorised[kept])
                row[f"{side}_tpr_1_{words}"] = tpr_at_fpr(scores[kept], memorised[kept], alpha=0.01)
                row[f"{side}_pixel_auc_{words}"] = float(quality["pixel_auc"][kept & memorised].mean())
                row[f"{side}_best_iou_{words}"] = float(quality["best_iou"][kept & memorised].mean())
            kept = sample_of(frame, truth, "local")[1] & (half == 1)
            for group, of_group in (("common", frame.common.to_numpy()), ("rare", ~frame.common.to_numpy())):
                chosen = quality["pixel_auc"][kept & of_group]
                row[f"report_pixel_auc_{group}_{words}"] = float(chosen.mean()) if len(chosen) else np.nan
        row["values"] = scores
        rows.append(row)
    _choose(rows)
    for row in rows:
        if row["shown"]:
            for truth in TRUTHS:
                kept, memorised = sample_of(frame, truth, "local")
                kept &= half == 1
                args = (row["values"][kept], memorised[kept], magnitude[kept], frame.cluster[kept])
                found = figure(row["mask"], "local", *args)
                for name in ("auc", "gain"):
                    for end in ("", "_low", "_high"):
                        row[f"{name}_{truth.split()[0]}{end}"] = getattr(found, name + end)
        del row["values"]
    _question_page(page, rows, passes, magnitude)
    return rows


def _choose(rows: list[Row]) -> None:
    """Mark what the page shows: the paper's layers of every source, the defaults, and the best of each source.

    `chosen` is the best by AUC on the copied captions of the choosing half, then by pixel AUC there; `points` the best
    by pixel AUC.
    """
    for row in rows:
        row["chosen"] = row["points"] = row["shown"] = False
    for source in dict.fromkeys(row["source"] for row in rows):
        of_source = [row for row in rows if row["source"] == source]
        best = max(of_source, key=lambda row: (row["choose_auc_measured"], row["choose_pixel_auc_measured"]))
        best["chosen"] = best["shown"] = True
        best = max(of_source, key=lambda row: row["choose_pixel_auc_measured"])
        best["points"] = best["shown"] = True
    for row in rows:
        is_paper = row["layers"] == PAPER and (row["token"] == "EOS" or row["source"] == "first step")
        is_default = row["energy"] and row["layers"] == "smoothing 3" and row["token"] == "power 1"
        is_map = row["source"].endswith("(score-difference map)") and row["mask"].endswith("smoothing 1, power 1")
        row["shown"] |= is_paper or is_default or is_map


def _question_page(page: Page, rows: list[Row], passes: Passes, magnitude: NDArray[np.float32]) -> None:
    frame, half = passes.frame, passes.frame.half.to_numpy()
    page.text("## 5. Which mask?")
    sizes = []
    for side, number in (("choosing", 0), ("reporting", 1)):
        kept, memorised = sample_of(frame, "measured copying", "local")
        copied, clean = memorised & (half == number), kept & ~memorised & (half == number)
        templates = frame.cluster[copied].nunique()
        sizes.append(f"{side} half: {copied.sum()} copied captions of {templates} templates, {clean.sum()} never seen")
    page.text(
        "The noise difference of the first step under every mask, local memorisation against never seen. Masks are "
        "chosen "
        f"on one half of the templates and reported on the other ({'; '.join(sizes)}). U-Net evaluations are what a "
        "caption "
        "needs at least, the first step's unconditional one being shared; milliseconds (one thread) are those of "
        "this project's "
        "scorers, "
        "unconditional ones included. **Bold**: best score of its source on the choosing half; *italic*: best pixel "
        f"AUC there. {len(rows)} masks are in "
        "the CSV, "
        "also by the design label. *gain* is against magnitude."
    )
    page.table("mask_question", rows, {
        "mask": _emphasised,
        "evaluations": lambda row: str(row["evaluations"]),
        "ms / caption": lambda row: f"{row['milliseconds']:.0f}",
        "pixel AUC": lambda row: f"{row['report_pixel_auc_measured']:.3f}",
        "all templates": lambda row: f"{row['report_pixel_auc_design']:.3f}",
        "common": lambda row: f"{row['report_pixel_auc_common_design']:.3f}",
        "rare": lambda row: f"{row['report_pixel_auc_rare_design']:.3f}",
        "best IoU": lambda row: f"{row['report_best_iou_measured']:.3f}",
        "AUC, copied": lambda row: between(row, "auc_measured"),
        "AUC, design label": lambda row: between(row, "auc_design"),
        "TPR@1%FPR, copied": lambda row: f"{row['report_tpr_1_measured']:.3f}",
        "gain, copied": lambda row: between(row, "gain_measured", "+.3f"),
    }, lambda row: row["shown"])  # fmt: skip
    page.text(
        "*pixel AUC* and *best IoU*: copied templates; then pixel AUC by design label: all, common, rare templates."
    )
    kept, memorised = sample_of(frame, "measured copying", "local")
    kept &= half == 1
    base = auc(magnitude[kept], memorised[kept])
    page.text(f"Magnitude on the reporting half, copied captions: AUC {base:.3f}.")
    page.picture("mask_question", _cost_plot(rows, base), "quality of every mask against its cost")
    page.text(
        "Left: AUC of the first-step LD, copied local captions against never seen, on the reporting half. Right: "
        "pixel AUC "
        "against the true regions. Small points: every mask; large: the paper's two layers with EOS, the best "
        "attention "
        "mask of each source by the choosing half, and the energy masks."
    )


def _emphasised(row: Row) -> str:
    stars = "*" * (2 * row["chosen"] + row["points"])
    return f"{stars}{row['mask']}{stars}"


def _cost_plot(rows: list[Row], magnitude: float) -> bytes:
    drawn, axes = new_figure(1, 2, 5.4, 4.2)
    keys = {"report_auc_measured": "AUC of first-step LD", "report_pixel_auc_measured": "pixel AUC"}
    groups = {
        "the paper's two layers, EOS": lambda row: row["layers"] == PAPER and row["token"] == "EOS",
        "attention, best of its source": lambda row: row[best] and not row["energy"],
        "energy, 3 x 3": lambda row: row["energy"] and row["mask"].endswith("smoothing 3, power 1"),
        "energy, best of its source": lambda row: row[best] and row["energy"],
    }
    for axis, (key, title) in zip(axes[0], keys.items(), strict=True):
        best = "chosen" if key == "report_auc_measured" else "points"
        axis.scatter([row["evaluations"] for row in rows], [row[key] for row in rows], s=6, color="0.75")
        for marker, (name, wanted) in zip("os^D", groups.items(), strict=True):
            part = sorted((row for row in rows if wanted(row)), key=lambda row: row["evaluations"])
            spread = {"marker": marker, "markersize": 6, "linewidth": 0.8, "alpha": 0.8}
            axis.plot([row["evaluations"] for row in part], [row[key] for row in part], label=name, **spread)
        if key == "report_auc_measured":
            axis.axhline(magnitude, color="0.4", linestyle=":", label="magnitude")
        axis.set_xscale("log")
        axis.set(xlabel="U-Net evaluations a caption", title=title)
        axis.legend(fontsize=7)
    return png_of(drawn)


def attention_per_step(page: Page, passes: Passes, whole: Arrays) -> None:
    """Plot 6: EOS attention of every step and its distribution at the last one, by kind."""
    frame, eos = passes.frame, whole["eos_t"]
    drawn, axes = new_figure(2, 2, 5.4, 3.4)
    words = []
    for row, (truth, title) in enumerate(TRUTHS.items()):
        edges = np.histogram_bin_edges(eos[:, -1], 30)
        for kind, colour in (("none", "tab:green"), ("local", "tab:orange"), ("global", "tab:blue")):
            kept, memorised = sample_of(frame, truth, "local" if kind == "none" else kind)
            part = eos[kept & ~memorised] if kind == "none" else eos[memorised]
            low, middle, high = np.quantile(part, [0.1, 0.5, 0.9], axis=0)
            steps = np.arange(1, eos.shape[1] + 1)
            axes[row, 0].plot(steps, middle, color=colour, label=f"{kind} ({len(part)})")
            axes[row, 0].fill_between(steps, low, high, color=colour, alpha=0.2)
            weights = np.full(len(part), 1 / len(part))
            axes[row, 1].hist(part[:, -1], edges, weights=weights, color=colour, alpha=0.45, label=kind)
            if kind != "none":
                words.append(f"{auc(eos[kept, -1], memorised[kept]):.3f} ({kind}, {truth})")
        axes[row, 0].set(xlabel="step", ylabel="mean EOS attention", title=title)
        axes[row, 1].set(xlabel="mean EOS attention of the last step", ylabel="share of captions", title=title)
        for axis in axes[row]:
            axis.legend(fontsize=7)
    page.text("## 6. EOS attention per step")
    page.picture("attention_per_step", png_of(drawn), "EOS attention of every step, and its distribution at the last")
    page.text(
        "Mean attention to the end-of-text token in the paper's two layers: median and the middle 80 % of captions. "
        "In the "
        "paper's Stable Diffusion the memorised ones end bright. Here the mean of the last step by itself tells "
        "memorised "
        f"captions from never seen ones with an AUC of {', '.join(words)}."
    )
