"""Which mask points at the true region, and which makes the best score: the paper's third table and beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.evaluation.plots import new_figure, png_of
from audit.statistics.metrics import auc, best_iou, iou_at
from pipelines import formulas
from pipelines.attention import TOKENS
from tests.benchmarks.published import published_masks
from tests.benchmarks.tables_noises import figure
from tests.benchmarks.tables_page import Page, Row, between
from tests.benchmarks.tables_passes import Arrays, Passes
from tests.benchmarks.tables_scores import EOS, ld, magnitude, masks_by_name, sample_of

FEW = 4
PAPER = "the paper's two"
TOKEN_WORDS = {"eos": "EOS", "bos": "1 - BOS", "padding": "EOS and padding"}
QUALITY = {"pixel_auc": "pixel AUC", "best_iou": "best IoU", "iou_at_mean": "IoU at mean"}


@dataclass(frozen=True)
class Variant:
    """One mask: where it is read, which layers and token (or smoothing and power), what a caption costs.

    Attributes:
        evaluations: U-Net evaluations a caption and noise as the product makes them. masks: [noises, N, H, W].
    """

    source: str
    layers: str
    token: str
    evaluations: int
    masks: NDArray[np.float32]

    @property
    def name(self) -> str:
        return f"{self.source}: {self.layers}, {self.token}"

    @property
    def is_energy(self) -> bool:
        return self.token.startswith("power")


def _stacked(found: list[Arrays], name: str) -> NDArray[Any]:
    return np.stack([each[name] for each in found])


def variants(
    passes: Passes, first: list[Arrays], low: list[Arrays], few: list[Arrays], whole: list[Arrays]
) -> list[Variant]:
    """Every mask the passes can give."""
    steps = passes.steps
    sources = [("first step", 1, first), ("pure noise, low t", 2, low)]
    sources += [(f"last of {FEW} steps", 2 * FEW, few)] if few else []
    sources.append((f"last of {steps} steps", 2 * steps, whole))
    places = {PAPER: passes.paper, **{short(name): [place] for place, name in enumerate(passes.layers)}}
    found = []
    for source, cost, made in sources:
        masks = _stacked(made, "masks")  # [noises, N, token, layer, H, W]
        for at, token in enumerate(TOKENS):
            for layers, place in places.items():
                mean = masks[:, :, at][:, :, place].astype(np.float32).mean(2)
                found.append(Variant(source, layers, TOKEN_WORDS[token], cost, mean))
    energies = [
        ("energy, first step", 1, _stacked(first, "energy")),
        ("energy, pure noise, low t", 2, _stacked(low, "energy")),
        (f"energy, last of {steps} steps (score-difference map)", 2 * steps, _stacked(whole, "energy_t")[:, :, -1]),
    ]
    for source, cost, energy in energies:
        for size in (1, 3, 5):
            smooth = torch.stack([formulas.energy_mask(torch.from_numpy(each), size) for each in energy])
            for power in (0.5, 1.0, 2.0):
                found.append(Variant(source, f"smoothing {size}", f"power {power:g}", cost, smooth.pow(power).numpy()))
    return found


def short(layer: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn2` -> `down 0.1`."""
    parts = layer.split(".")
    return f"{parts[0].split('_')[0]} " + ".".join(part for part in parts[1:4] if part.isdigit())


def localisation(
    masks: NDArray[np.float32], frame: pd.DataFrame, names: tuple[str, ...] = tuple(QUALITY)
) -> dict[str, NDArray[np.float64]]:
    """Against the true 64 x 64 regions: pixel AUC, best IoU, IoU above the mask's mean; [noises, N].

    NaN without a region.

    Args:
        masks: [noises, N, H, W].
    """
    regions = testbed.regions()
    large = np.stack([formulas.resize_mask(torch.from_numpy(each), (64, 64)).numpy() for each in masks])
    every = np.ones((1, 64 * 64))
    found = {name: np.full(masks.shape[:2], np.nan) for name in names}
    for row, cluster in enumerate(frame.cluster):
        if cluster in regions:
            for noise, mask in enumerate(large[:, row]):
                # the weighted form of the same figure: `pixel_auc` asks scikit-learn, which takes 50 times as long
                values = {
                    "pixel_auc": lambda m=mask, r=regions[cluster]: auc(m.ravel(), r.ravel(), every)[0],
                    "best_iou": lambda m=mask, r=regions[cluster]: best_iou(m, r)[0],
                    "iou_at_mean": lambda m=mask, r=regions[cluster]: iou_at(m, r, float(m.mean())),
                }
                for name in names:
                    found[name][noise, row] = values[name]()
    return found


def mean_over(values: NDArray[np.float64], clusters: Any, name: str) -> Row:
    """Mean over captions and noises, least and most of the noises, interval resampled over clusters and noises.

    Args:
        values: [noises, n].
    """
    by_noise = values.mean(1)
    row = {name: float(by_noise.mean()), f"{name}_least": float(by_noise.min()), f"{name}_most": float(by_noise.max())}
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.stack([np.bincount(codes, each, len(names)) for each in values])
    counts, draw = np.bincount(codes), np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        noises, of = draw.integers(len(values), size=len(values)), draw.integers(len(names), size=len(names))
        drawn.append(sums[noises][:, of].sum() / (counts[of].sum() * len(noises)))
    row[f"{name}_low"], row[f"{name}_high"] = (float(each) for each in np.quantile(drawn, [0.025, 0.975]))
    return row


def mask_quality(
    page: Page,
    frame: pd.DataFrame,
    passes: Passes,
    first: list[Arrays],
    low: list[Arrays],
    few: list[Arrays],
    whole: list[Arrays],
) -> list[Row]:
    """Table 6: how well the masks one can have cheaply point at the true regions. Returns its rows."""
    stored = [masks_by_name(passes, *each) for each in zip(first, whole, strict=True)]

    def paper(found: list[Arrays]) -> NDArray[np.float32]:
        return _stacked(found, "masks")[:, :, EOS][:, :, passes.paper].astype(np.float32).mean(2)

    masks = {"BE (EOS, final step)": paper(whole), "EOS, first step": paper(first)}
    masks["EOS, pure noise at low t"] = paper(low)
    masks |= {f"EOS, last of {FEW} steps": paper(few)} if few else {}
    masks["score-difference map, final step"] = np.stack([each["score_map"] for each in stored])
    masks["energy mask, first step"] = np.stack([each["energy_mask"] for each in stored])
    kept, common = sample_of(frame, "measured copying", "local")[1], frame.common.to_numpy()
    groups = {"all": kept, "common": kept & common, "rare": kept & ~common}
    rows: list[Row] = []
    for name, mask in masks.items():
        quality = localisation(mask, frame)
        for group, of in groups.items():
            row: Row = {"mask": name, "templates": group, "captions": int(of.sum())}
            for key, values in quality.items():
                row |= mean_over(values[:, of], frame.cluster[of], key) if of.any() else {}
            rows.append(row)
    page.text("## 6. Mask quality")
    page.text(
        "The paper's two layers at 64 x 64 against the true fixed regions of copied templates, means over captions and "
        "noises. *best IoU* knows the best threshold of each mask, *IoU at mean* cuts at the mask's own mean, as "
        "`--store-masks bits` stores it. 0.5 is the pixel AUC of chance. Captions: "
        + ", ".join(f"{int(of.sum())} of {group} templates" for group, of in groups.items())
        + "; common templates have 30 to 60 % of the picture fixed, rare ones 7 to 25 %."
    )
    columns: dict[str, Any] = {"mask": lambda row: row["mask"]}
    columns |= {title: lambda row, k=key: between(row, k) for key, title in QUALITY.items()}
    at = {(row["mask"], row["templates"]): row for row in rows}
    for group in ("common", "rare"):
        if groups[group].any():
            columns[f"pixel AUC, {group}"] = lambda row, g=group: between(_short(at[row["mask"], g]), "pixel_auc")
            columns[f"IoU at mean, {group}"] = lambda row, g=group: between(_short(at[row["mask"], g]), "iou_at_mean")
    page.table("masks", rows, columns, lambda row: row["templates"] == "all")
    published_masks(page)
    return rows


def _short(row: Row) -> Row:
    """Without the interval."""
    return {key: value for key, value in row.items() if not key.endswith(("_low", "_high"))}


def mask_question(
    page: Page,
    frame: pd.DataFrame,
    passes: Passes,
    first: list[Arrays],
    low: list[Arrays],
    few: list[Arrays],
    whole: list[Arrays],
) -> list[Row]:
    """Table 7: every mask as the mask of a first-step LD; chosen on half of the templates and noises, reported on the
    others."""
    half, energy = frame.half.to_numpy(), _stacked(first, "energy")
    middle = len(energy) // 2
    sides = {"choose": (half == 0, slice(0, middle)), "report": (half == 1, slice(middle, None))}
    base = magnitude(energy)
    kept, memorised = sample_of(frame, "measured copying", "local")
    rows: list[Row] = []
    for each in variants(passes, first, low, few, whole):
        scores = np.stack([ld(*of) for of in zip(energy, each.masks, strict=True)])
        pixel = localisation(each.masks, frame, ("pixel_auc",))["pixel_auc"]
        row: Row = {"mask": each.name, "source": each.source, "layers": each.layers, "token": each.token}
        row |= {"evaluations": each.evaluations, "energy": each.is_energy}
        for side, (of_half, noises) in sides.items():
            part, copied = kept & of_half, memorised & of_half
            aucs = [auc(values[part], memorised[part]) for values in scores[noises]]
            row[f"{side}_auc"] = float(np.mean(aucs))
            row |= mean_over(pixel[noises][:, copied], frame.cluster[copied], f"{side}_pixel_auc")
        row["values"] = scores
        rows.append(row)
    _choose(rows)
    of_half, noises = sides["report"]
    part = kept & of_half
    for row in rows:
        if row["shown"]:
            args = (memorised[part], base[noises][:, part], frame.cluster[part])
            found = figure(row["mask"], "local", row["values"][noises][:, part], *args)
            row |= {key: value for key, value in found.items() if key.startswith(("auc", "tpr", "gain"))}
        del row["values"]
    magnitudes = [auc(values[part], memorised[part]) for values in base[noises]]
    _question_page(page, rows, frame, sides, float(np.mean(magnitudes)))
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
        best = max(of_source, key=lambda row: (row["choose_auc"], row["choose_pixel_auc"]))
        best["chosen"] = best["shown"] = True
        best = max(of_source, key=lambda row: row["choose_pixel_auc"])
        best["points"] = best["shown"] = True
    for row in rows:
        is_paper = row["layers"] == PAPER and (row["token"] == "EOS" or row["source"] == "first step")
        is_default = row["energy"] and row["layers"] == "smoothing 3" and row["token"] == "power 1"
        is_map = row["source"].endswith("(score-difference map)") and row["mask"].endswith("smoothing 1, power 1")
        row["shown"] |= is_paper or is_default or is_map


def _question_page(page: Page, rows: list[Row], frame: pd.DataFrame, sides: Any, base: float) -> None:
    page.text("## 7. Which mask?")
    kept, memorised = sample_of(frame, "measured copying", "local")
    sizes = []
    for words, (of_half, _) in zip(("choosing", "reporting"), sides.values(), strict=True):
        copied, clean = memorised & of_half, kept & ~memorised & of_half
        templates = frame.cluster[copied].nunique()
        sizes.append(f"{words} half: {copied.sum()} copied captions of {templates} templates, {clean.sum()} never seen")
    page.text(
        "The noise difference of the first step under every mask, copied local captions against never seen. Masks are "
        "chosen on one half of the templates and of the noises and reported on the others "
        f"({'; '.join(sizes)}). U-Net evaluations are those of a caption and noise as the product makes them. "
        "**Bold**: best score of its source on the choosing half; *italic*: best pixel AUC there. "
        f"{len(rows)} masks are in the CSV. *gain* is against magnitude under the same noise."
    )
    page.table("mask_question", rows, {
        "mask": _emphasised,
        "evaluations": lambda row: str(row["evaluations"]),
        "pixel AUC": lambda row: between(row, "report_pixel_auc"),
        "AUC": lambda row: between(row, "auc"),
        "TPR@1%FPR": lambda row: between(row, "tpr_1"),
        "TPR@0.1%FPR": lambda row: between(row, "tpr_01"),
        "gain": lambda row: between(row, "gain", "+.3f"),
    }, lambda row: row["shown"])  # fmt: skip
    page.text(f"Magnitude there: AUC {base:.3f}, mean over the noises.")
    page.picture("mask_question", _cost_plot(rows, base), "quality of every mask against its cost")
    page.text(
        "Left: AUC of the first-step LD, copied local captions against never seen, on the reporting half. Right: "
        "pixel AUC against the true regions. Small points: every mask; large: the paper's two layers with EOS, the "
        "best attention mask of each source by the choosing half, and the energy masks."
    )


def _emphasised(row: Row) -> str:
    stars = "*" * (2 * row["chosen"] + row["points"])
    return f"{stars}{row['mask']}{stars}"


def _cost_plot(rows: list[Row], magnitude: float) -> bytes:
    drawn, axes = new_figure(1, 2, 5.4, 4.2)
    keys = {"report_auc": "AUC of first-step LD", "report_pixel_auc": "pixel AUC"}
    groups = {
        "the paper's two layers, EOS": lambda row: row["layers"] == PAPER and row["token"] == "EOS",
        "attention, best of its source": lambda row: row[best] and not row["energy"],
        "energy, 3 x 3": lambda row: row["energy"] and row["mask"].endswith("smoothing 3, power 1"),
        "energy, best of its source": lambda row: row[best] and row["energy"],
    }
    for axis, (key, title) in zip(axes[0], keys.items(), strict=True):
        best = "chosen" if key == "report_auc" else "points"
        axis.scatter([row["evaluations"] for row in rows], [row[key] for row in rows], s=6, color="0.75")
        for marker, (name, wanted) in zip("os^D", groups.items(), strict=True):
            part = sorted((row for row in rows if wanted(row)), key=lambda row: row["evaluations"])
            spread = {"marker": marker, "markersize": 6, "linewidth": 0.8, "alpha": 0.8}
            axis.plot([row["evaluations"] for row in part], [row[key] for row in part], label=name, **spread)
        if key == "report_auc":
            axis.axhline(magnitude, color="0.4", linestyle=":", label="magnitude")
        axis.set_xscale("log")
        axis.set(xlabel="U-Net evaluations a caption", title=title)
        axis.legend(fontsize=7)
    return png_of(drawn)


def attention_per_step(page: Page, frame: pd.DataFrame, whole: list[Arrays]) -> None:
    """Plot 8: EOS attention of every step and its distribution at the last one, all noises together."""
    eos = _stacked(whole, "eos_t")  # [noises, N, steps]
    drawn, axes = new_figure(1, 2, 5.4, 3.4)
    words, edges = [], np.histogram_bin_edges(eos[..., -1], 30)
    for kind, colour in (("none", "tab:green"), ("local", "tab:orange"), ("global", "tab:blue")):
        kept, memorised = sample_of(frame, "measured copying", "local" if kind == "none" else kind)
        part = eos[:, kept & ~memorised if kind == "none" else memorised].reshape(-1, eos.shape[2])
        low, middle, high = np.quantile(part, [0.1, 0.5, 0.9], axis=0)
        steps = np.arange(1, eos.shape[2] + 1)
        axes[0, 0].plot(steps, middle, color=colour, label=f"{kind} ({len(part)})")
        axes[0, 0].fill_between(steps, low, high, color=colour, alpha=0.2)
        axes[0, 1].hist(
            part[:, -1], edges, weights=np.full(len(part), 1 / len(part)), color=colour, alpha=0.45, label=kind
        )
        if kind != "none":
            aucs = [auc(values[kept, -1], memorised[kept]) for values in eos]
            words.append(f"{np.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f}; {kind})")
    axes[0, 0].set(xlabel="step", ylabel="mean EOS attention")
    axes[0, 1].set(xlabel="mean EOS attention of the last step", ylabel="share of captions and noises")
    for axis in axes[0]:
        axis.legend(fontsize=7)
    page.text("## 8. EOS attention per step")
    page.picture("attention_per_step", png_of(drawn), "EOS attention of every step, and its distribution at the last")
    page.text(
        "Mean attention to the end-of-text token in the paper's two layers: median and the middle 80 % of copied and "
        "of never seen captions, all noises. In the paper's Stable Diffusion the memorised ones end bright. Here the "
        "mean of the last step by itself tells copied captions from never seen ones with an AUC of "
        f"{', '.join(words)}."
    )
