"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts finished units of a job on stderr, from any thread.

    Args:
        total: units in all.
        unit: what is counted, plural: `captions`.
        title: what is being done.
        initial: units done before (not counted in the rate).
    """

    def __init__(self, total: int, unit: str, title: str, initial: int = 0) -> None:
        self.total, self.unit, self.title, self.initial, self.done = total, unit, title, initial, initial
        self.started = self.last_line = time.monotonic()
        self.said = initial  # units in the last line
        self._counting = threading.Lock()
        terminal = sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=initial, unit=f" {unit}", desc=title, dynamic_ncols=True) if terminal else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done not in (self.initial, self.said):
            self._line()

    def add(self, units: int) -> None:
        """Count units as done (negative takes some back when a shard is tried again)."""
        with self._counting:
            self.done += units
            if self.bar is not None:
                self.bar.update(units)
            elif time.monotonic() - self.last_line > LINE_SECONDS:
                self._line()

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def _line(self) -> None:
        now = self.last_line = time.monotonic()
        self.said = self.done
        rate = (self.done - self.initial) / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        print(f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{eta}", file=sys.stderr)
