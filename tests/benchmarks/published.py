"""Figures that papers print for the same methods on Stable Diffusion, to stand beside the testbed's, never mixed in.

Another model, other captions, other seeds: nothing here compares with the testbed's figures.
"""

from __future__ import annotations

from tests.benchmarks.tables_page import Page, Row

JEON = "Jeon et al. 2025, ICML, table 1"
CHEN = "Chen et al. 2025, ICLR, as its authors' slides print it"
KIM = "Kim & Lee 2026, ICML, by a summary of the paper"

_RUNS = {  # (method, window): images a prompt -> AUC and TPR@1%FPR on SD 1.4, then on SD 2.0
    ("magnitude", "first step"): {
        1: (0.976, 0.896, 0.948, 0.739),
        4: (0.992, 0.944, 0.980, 0.876),
        16: (0.990, 0.928, 0.983, 0.881),
    },
    ("magnitude", "all"): {
        1: (0.983, 0.948, 0.982, 0.904),
        4: (0.996, 0.982, 0.990, 0.949),
        16: (0.998, 0.980, 0.991, 0.945),
    },
    ("LD, BE mask", "all"): {
        1: (0.986, 0.950, 0.983, 0.908),
        4: (0.997, 0.980, 0.990, 0.945),
        16: (0.997, 0.982, 0.990, 0.949),
    },
}

DETECTION: list[Row] = [
    {"score": score, "window": window, "images": images, "auc_sd14": figures[0], "tpr_1_sd14": figures[1],
     "auc_sd20": figures[2], "tpr_1_sd20": figures[3], "source": JEON}
    for (score, window), runs in _RUNS.items() for images, figures in runs.items()
]  # fmt: skip
"""500 memorised prompts of Webster (2023) on SD 1.4, 219 on SD 2.0, against 500 others; means over the images."""

_WINDOWS = ("first step", "first 10", "all")
_CHEN = {  # (score, type): AUC, best F1 and TPR@1%FPR of each window
    ("magnitude", "local"): ((0.918, 0.864, 0.629), (0.989, 0.982, 0.953), (0.990, 0.983, 0.560)),
    ("LD, BE mask", "local"): ((0.943, 0.893, 0.731), (0.995, 0.987, 0.985), (0.996, 0.988, 0.926)),
    ("magnitude", "global"): ((0.979, 0.944, 0.934), (1.000, 0.987, 1.000), (0.999, 0.976, 1.000)),
    ("LD, BE mask", "global"): ((0.981, 0.948, 0.940), (1.000, 0.987, 1.000), (0.999, 0.977, 1.000)),
}

CHEN_DETECTION: list[Row] = [
    {"score": score, "type": kind, "window": window, "auc": auc, "f1": f1, "tpr_1": tpr, "source": CHEN}
    for (score, kind), windows in _CHEN.items() for window, (auc, f1, tpr) in zip(_WINDOWS, windows, strict=True)
]  # fmt: skip
"""The paper's detection table, Stable Diffusion 1.4."""

CHEN_EVALUATION: list[Row] = [
    {"score": score, "local": local, "global": global_, "source": CHEN}
    for score, local, global_ in (("sscd", 0.940, 1.000), ("s", 0.991, 1.000), ("ls", 0.995, 1.000))
]
"""The paper's evaluation table, AUC on Stable Diffusion 1.4."""

MASKS: list[Row] = [
    {"mask": mask, "iou_sd14_templates": figures[0], "iou_sd14_all": figures[1],
     "iou_sd21_templates": figures[2], "iou_sd21_templates_and_none": figures[3], "source": KIM}
    for mask, figures in {
        "the whole picture": (0.560, 0.522, 0.649, 0.325),
        "BE (EOS, final step)": (0.751, 0.564, 0.933, 0.956),
        "score-difference map, final step": (0.830, 0.918, 0.785, 0.794),
    }.items()
]  # fmt: skip
"""IoU with Webster's template masks at the threshold that is best for the whole set."""

DETECTORS = {
    "magnitude": f"0.960 / 0.760 (Wen et al. 2024); 0.976 / 0.896 ({JEON})",
    "attention_entropy": f"0.846 / 0.116 (Ren et al.'s LE; {JEON})",
    "cosine_low": "0.923 / 0.424 (Asthana & Belagiannis 2026)",
    "anisotropy": "0.994 / 0.935 (Asthana & Belagiannis 2026)",
}
"""AUC / TPR@1%FPR on Stable Diffusion 1.4, one image a prompt."""


def published_detection(page: Page) -> None:
    """The figures that belong beside the detection table."""
    page.text(
        f"**The paper's own figures, as published for Stable Diffusion 1.4** ({CHEN}). Its captions and images are "
        "others: not comparable with the testbed's figures. There LD gains 0.025 AUC over magnitude at the first step "
        "on local copies."
    )
    page.table("published_chen_detection", CHEN_DETECTION, {
        "score": lambda row: f"{row['score']}, {row['window']}",
        "type": lambda row: row["type"],
        "AUC": lambda row: f"{row['auc']:.3f}",
        "TPR@1%FPR": lambda row: f"{row['tpr_1']:.3f}",
        "best F1": lambda row: f"{row['f1']:.3f}",
    })  # fmt: skip
    page.text(
        f"**On Stable Diffusion, as published** ({JEON}): 500 memorised prompts of Webster (2023) for SD 1.4 and 219 "
        "for SD 2.0, local and global together, against 500 others. Not comparable with the testbed's figures. There "
        "the AUCs of LD and of magnitude over all steps differ by 0.003 at most."
    )
    page.table("published_detection", DETECTION, {
        "score": lambda row: f"{row['score']}, {row['window']}",
        "images a prompt": lambda row: str(row["images"]),
        "SD 1.4 AUC": lambda row: f"{row['auc_sd14']:.3f}",
        "SD 1.4 TPR@1%FPR": lambda row: f"{row['tpr_1_sd14']:.3f}",
        "SD 2.0 AUC": lambda row: f"{row['auc_sd20']:.3f}",
        "SD 2.0 TPR@1%FPR": lambda row: f"{row['tpr_1_sd20']:.3f}",
    })  # fmt: skip


def published_evaluation(page: Page) -> None:
    """The figures that belong beside the evaluation table."""
    page.text(
        f"**The paper's own figures, as published for Stable Diffusion 1.4** ({CHEN}), AUC, with the real SSCD. Not "
        "comparable with the testbed's figures."
    )
    page.table("published_chen_evaluation", CHEN_EVALUATION, {
        "score": lambda row: f"`{row['score']}`",
        "local": lambda row: f"{row['local']:.3f}",
        "global": lambda row: f"{row['global']:.3f}",
    })  # fmt: skip


def published_masks(page: Page) -> None:
    """The figures that belong beside the table of masks."""
    page.text(
        f"**On Stable Diffusion, as published** ({KIM}, not read in the paper itself): IoU with Webster's template "
        "masks at the threshold that is best for the whole set. *templates*: template prompts alone; *all*: with "
        "wholly copied and never seen ones. Not comparable with the testbed's figures. On SD 1.4 the noise difference "
        "points better than the BE mask, on SD 2.1 worse."
    )
    page.table("published_masks", MASKS, {
        "mask": lambda row: row["mask"],
        "SD 1.4, templates": lambda row: f"{row['iou_sd14_templates']:.3f}",
        "SD 1.4, all": lambda row: f"{row['iou_sd14_all']:.3f}",
        "SD 2.1, templates": lambda row: f"{row['iou_sd21_templates']:.3f}",
        "SD 2.1, templates and never seen": lambda row: f"{row['iou_sd21_templates_and_none']:.3f}",
    })  # fmt: skip
