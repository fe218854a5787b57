"""Tables and plots of `make tables` as one Markdown page, a CSV a table and a PNG a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from audit.evaluation.config import EvaluateConfig
from audit.evaluation.evaluate import Figure, measure
from audit.evaluation.series import Series

Row = dict[str, Any]
NO_IDS = np.zeros(0, np.int64)


class Page:
    """The page being written.

    Args:
        folder: of the page; its tables and plots go into folder/tables.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts = folder, [""]
        (folder / "tables").mkdir(parents=True, exist_ok=True)

    def text(self, text: str) -> None:
        """A paragraph, heading or list."""
        self.parts.append(text.strip())

    def table(
        self, name: str, rows: Sequence[Row], columns: dict[str, Callable[[Row], str]], shown: Any = None
    ) -> None:
        """All rows as tables/NAME.csv, and those that `shown` wants as Markdown with these columns."""
        head = list(dict.fromkeys(key for row in rows for key in row))
        with (self.folder / "tables" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows([[_cell(row.get(key, "")) for key in head] for row in rows])
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        kept = [row for row in rows if shown is None or shown(row)]
        lines += ["| " + " | ".join(make(row) for make in columns.values()) + " |" for row in kept]
        self.parts.append("\n".join(lines))
        self.parts.append(f"[tables/{name}.csv](tables/{name}.csv)")

    def picture(self, name: str, png: bytes, text: str) -> None:
        """A plot, as tables/NAME.png."""
        (self.folder / "tables" / f"{name}.png").write_bytes(png)
        self.parts.append(f"![{text}](tables/{name}.png)")

    def write(self, name: str) -> Path:
        """The page itself."""
        path = self.folder / name
        path.write_text("\n\n".join(self.parts[1:]) + "\n")
        return path


def figure(
    score: str, kind: str, values: Any, memorised: Any, baseline: Any, clusters: Any, resamples: int = 1000
) -> Figure:
    """`audit.evaluation.evaluate.measure` of one score, arrays [n]."""
    series = Series("tables", score, "one", NO_IDS, np.zeros(0))
    arrays = [np.asarray(each, np.float64) for each in (values, baseline)]
    config = EvaluateConfig(resamples=resamples)
    return measure(
        series, kind, arrays[0], np.asarray(memorised, bool), arrays[1], np.asarray(clusters, object), config
    )


def as_row(found: Figure, **more: Any) -> Row:
    """A figure as a row of a table, after the columns of its own."""
    return {**more, **{key: value for key, value in asdict(found).items() if key not in ("stage", "images")}}


def between(row: Row, name: str, form: str = ".3f") -> str:
    """`0.961 [0.912, 0.990]`; without brackets where there is no interval."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def better_or_worse(row: Row) -> str:
    """What the interval of a gain says."""
    if row["gain_low"] > 0:
        return "better"
    return "worse" if row["gain_high"] < 0 else "not told apart"


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
