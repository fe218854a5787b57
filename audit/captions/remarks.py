"""What is legal in a text file and perhaps not meant: counted while its rows are staged, said in a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any


class Remarks:
    """Rows whose caption stands under another name, and quoted fields over several lines, of all text files of a plan.

    Args:
        names: of caption columns, in any case.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = {name.lower() for name in names}
        self._rows, self._row = 0, ""
        self._elsewhere: Counter[str] = Counter()
        self._fields, self._field = 0, ""

    def no_caption(self, place: str, record: Mapping[str, Any]) -> None:
        """Note a row without a caption. `place`: file and line; `record`: its values, by column."""
        found = [name for name, value in record.items() if name.lower() in self._names and has_text(value)]
        if found:
            self._rows, self._row = self._rows + 1, self._row or place
            self._elsewhere.update(found)

    def over_lines(self, path: str, last: int, row: list[str]) -> None:
        """Note a row of CSV that goes over several lines, of which `last` is its last."""
        breaks = [count for field in row if (count := field.count("\n"))]
        if breaks:
            self._fields += len(breaks)
            self._field = self._field or f"{path}, lines {last - sum(breaks)} to {last}"

    def lines(self) -> list[str]:
        """For people."""
        found = []
        if self._rows:
            names = ", ".join(f"{name} ({count:,})" for name, count in self._elsewhere.most_common())
            found.append(
                f"{_count(self._rows, 'row')} read as empty, but with text in another column, {names}, the first "
                f"{self._row}: call it alike in every row, or say which with --caption-col"
            )
        if self._fields:
            found.append(
                f"{_count(self._fields, 'quoted field')} over several lines, the first {self._field}: where a quote "
                "that is a letter swallowed rows, pass --quoting none; --quoting csv where they are meant"
            )
        return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def has_text(value: Any) -> bool:
    """Whether a value is a text that is not blank, or a list with one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, str) and each.strip() for each in values)
