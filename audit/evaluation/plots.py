"""Plots of the evaluation, drawn without a display and handed back as PNG; matplotlib is loaded on the first plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BINS = 40


LEFT, RIGHT, BOTTOM, TOP = 0.75, 0.3, 0.6, 0.35
"""Inches of a panel around its axes: matplotlib's own layouts draw a figure once more to find them."""


def new_figure(rows: int, columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Any, Any]:
    """A grid of panels, `width` x `height` inches each: (figure, axes [rows, columns])."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    figure.subplots_adjust(
        left=LEFT / (width * columns),
        right=1 - RIGHT / (width * columns),
        bottom=BOTTOM / (height * rows),
        top=1 - TOP / (height * rows),
        wspace=(LEFT + RIGHT) / (width - LEFT - RIGHT),
        hspace=(BOTTOM + TOP) / (height - BOTTOM - TOP),
    )
    return figure, axes


def png_of(figure: Any) -> bytes:
    """The figure as PNG; it is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    # no version in the file: the same figures give the same bytes
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _shown(text: str) -> str:
    """Text as matplotlib shows it as it is: `$` begins no formula, and no `_` hides it from a legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def roc_plot(panels: Mapping[str, Mapping[str, tuple[Values, Values]]]) -> bytes:
    """ROC curves, a panel each: title -> name of the curve -> (fpr, tpr), both rising from 0 to 1.

    The x axis is a square root: the low false-positive rates, which matter, get a third of it.
    """
    columns = min(3, len(panels))
    figure, axes = new_figure(-(-len(panels) // columns), columns, 4.6, 4.2)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for place, (name, (fpr, tpr)) in enumerate(curves.items()):
            axis.plot(fpr, tpr, label=_shown(name), linewidth=1.4, linestyle=("-", "--", ":", "-.")[place // 10 % 4])
        chance = np.linspace(0, 1, 101)
        axis.plot(chance, chance, color="0.7", linewidth=0.8)
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xticks([0, 0.01, 0.1, 0.25, 0.5, 1], ["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
        axis.set(xlim=(0, 1), ylim=(0, 1.02), title=_shown(title))
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.legend(fontsize=6.5, loc="lower right")
    return png_of(figure)


def distribution_plot(scores: Mapping[str, Mapping[str, Values]]) -> bytes:
    """Histograms of each score by label: name of the score -> label -> values [n]; what is not finite is left out."""
    columns = min(3, len(scores))
    figure, axes = new_figure(-(-len(scores) // columns), columns, 4.2, 2.8)
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    for axis, (name, groups) in zip(axes.flat, scores.items(), strict=False):
        finite = {label: values[np.isfinite(values)] for label, values in groups.items()}
        everything = np.concatenate([*finite.values(), np.zeros(0)])
        edges = np.histogram_bin_edges(everything, BINS) if len(everything) else np.linspace(0, 1, BINS + 1)
        for label, values in finite.items():
            weights = np.full(len(values), 1 / max(len(values), 1))
            shown = _shown(f"{label} ({len(values)})")
            axis.hist(values, edges, weights=weights, histtype="stepfilled", alpha=0.45, label=shown)
        axis.set(title=_shown(name), ylabel="share of captions")
        axis.legend(fontsize=7)
    return png_of(figure)
