"""Durations, sizes, tables and cells, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import humanize
from tabulate import tabulate

_FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]|'*[\t\r\n]")


def duration(seconds: float) -> str:
    """`12.3 s`, `4.5 min`, `2.0 h`: one unit, so that two lines can be compared at a glance.

    >>> duration(12.34), duration(300), duration(9000)
    ('12.3 s', '5.0 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes with a unit: `1.5 MB`."""
    return humanize.naturalsize(count)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Rows as lines of aligned columns under a head; `right` says which columns are aligned to the right."""
    align = ["right" if side else "left" for side in right] or ["left"] * len(head)
    text = tabulate(rows, head, tablefmt="simple", disable_numparse=True, colalign=align if rows else None)
    return [line.rstrip() for line in text.splitlines()]


def reasons(counts: Mapping[str, int]) -> str:
    """`2 hidden, 1 of other kinds`: how much was left out, by reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def plain_text(value: str) -> str:
    """A cell that no spreadsheet takes for a formula: one apostrophe goes before what could start one.

    Undone by taking one apostrophe away from a cell that matches the same rule: `'*\\s*[=+-@]`.
    """
    return "'" + value if _FORMULA.match(value) else value
