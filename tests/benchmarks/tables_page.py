"""Tables and plots of `make tables` as one Markdown page, a CSV a table and a PNG a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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


def between(row: Row, name: str, form: str = ".3f") -> str:
    """`0.961 (0.955 to 0.970) [0.912, 0.990]`: least and most over the noises, interval; without those that are not."""
    text = f"{row[name]:{form}}"
    if row.get(f"{name}_most", row[name]) != row.get(f"{name}_least", row[name]):
        text += f" ({row[name + '_least']:{form}} to {row[name + '_most']:{form}})"
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    return text + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def better_or_worse(row: Row) -> str:
    """What the interval of a gain says."""
    if row["gain_low"] > 0:
        return "better"
    return "worse" if row["gain_high"] < 0 else "not told apart"


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
