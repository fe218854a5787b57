"""The HTML report: index.html from a template, the rows as data.js, styles and scripts copied beside them."""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

import jinja2
import pyarrow as pa

from audit.base.storage import Folder
from audit.base.text import duration
from audit.reports.flagged import FLAGGED_COLUMNS, Flagged
from audit.reports.pictures import script, write_rows
from audit.run.run import Run
from audit.run.schema import DETECTORS, MATCH_COLUMNS, MITIGATED_COLUMNS, SCORES, TRAJECTORY_COLUMNS, VERDICTS, WINDOWS

STATIC = ("report.css", "report.js", "icon.svg")
VERDICT_TEXT = {
    "global": "A generated image is a copy of a training picture: SSCD above 0.5.",
    "local": "What a region of a generated image shows is also in a training picture; the rest differs.",
    "none": "No copy was found among the training pictures it was compared with.",
    "no_reference": "No training picture could be compared.",
    "unconfirmed": "Flagged by its score alone; no image was generated and compared yet.",
}
_SHOWN = (
    "score",
    "verdict_images",
    "num_images",
    "p_value",
    "q_value",
    "occurrences",
    "num_tokens",
    *DETECTORS,
    "ld_std",
    *WINDOWS,
    *(f"best_{name}" for name in ("sscd", "correlation_distance", "distance", "s")),
    *(f"best_{name}" for name in ("ls", "ls_norm", "ls_energy", "ls_score", "ls_corr")),
)
_TEXT = ("caption", "verdict", "source_url", "source_key", "mask_source", "input_file", "input_row")
_CHART = (760, 250)  # of the histogram's view box, pixels


def write_page(run: Run, folder: Folder, flagged: Flagged, facts: dict[str, Any], exports: list[str]) -> None:
    """Write the page and everything it loads; index.html last.

    Args:
        run: the run. folder: the report's. flagged: its rows. facts: report_facts. exports: names to link.
    """
    listed = set(flagged.table["row_id"].to_pylist())
    thumbnails = write_rows(run, folder, listed)
    folder.write("data.js", script("BE_AUDIT.rows", page_data(flagged.table, thumbnails)))
    package = importlib.resources.files("audit.reports")
    for name in STATIC:
        folder.write(name, (package / "static" / name).read_bytes())
    folder.write("index.html", render(facts, exports).encode(errors="replace"))


def render(facts: dict[str, Any], exports: list[str]) -> str:
    """index.html: facts filled into the template, everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("audit.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "figure": _figure, "duration": duration, "file": _file_name}
    texts = {"verdicts": VERDICT_TEXT, "score": column_text(facts["score"])}
    return environment.get_template("index.html").render(f=facts, chart=chart(facts), text=texts, exports=exports)


def page_data(table: pa.Table, thumbnails: dict[int, dict[str, str | None]]) -> dict[str, Any]:
    """What report.js shows, by column: numbers rounded to 6 digits, ids as text, null columns left out."""
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in _TEXT}
    for name in _SHOWN:
        values = table[name]
        if values.null_count < len(values):
            numbers = values.to_pylist()
            columns[name] = [_short(value) for value in numbers] if pa.types.is_floating(values.type) else numbers
    ids = table["row_id"].to_pylist()
    labels: dict[str, int] = {}
    columns["template"] = [labels.setdefault(label, len(labels)) for label in table["template"].to_pylist()]
    opened = {str(row_id): [thumb["image"], thumb["reference"]] for row_id, thumb in thumbnails.items()}
    return {
        "ids": [str(row_id) for row_id in ids],
        "columns": columns,
        "templates": list(labels),
        "pictures": opened,
        "score": table["score_name"][0].as_py() if table.num_rows else "",
        "scores": [name for name in SCORES if name in columns],
        "about": {name: column_text(name) for name in (*_SHOWN, "mask_source", "ld_t", "magnitude_t")}
        | {name: text for name, (_, text) in (MITIGATED_COLUMNS | MATCH_COLUMNS).items()},
        "verdicts": VERDICT_TEXT,
        "order": [*VERDICTS, "unconfirmed"],
    }


def column_text(name: str) -> str:
    """One line on a column."""
    if name in FLAGGED_COLUMNS:
        return FLAGGED_COLUMNS[name][1].removeprefix("match the verdict rests on: ")
    return TRAJECTORY_COLUMNS[name][1]


def chart(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The histogram as bars in a view box of _CHART, heights by log(1 + count); None without scores."""
    found = facts["histogram"]
    if not found["edges"]:
        return None
    width, height = _CHART
    low, high = found["edges"][0], found["edges"][-1]
    top = math.log1p(max(found["all"]))
    step = width / len(found["all"])

    def bars(counts: list[int]) -> list[dict[str, Any]]:
        shown = []
        for place, count in enumerate(counts):
            if count:
                tall = round(height * math.log1p(count) / top, 2)
                edges = found["edges"][place : place + 2]
                title = f"{edges[0]:.3g} to {edges[1]:.3g}: {count:,}"
                x, y = round(place * step + 1, 2), round(height - tall, 2)
                shown.append({"x": x, "y": y, "width": round(step - 2, 2), "height": tall, "title": title})
        return shown

    place = lambda score: round(width * (score - low) / (high - low), 2)  # noqa: E731
    threshold = facts["threshold"]
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    counts = [count for count in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000) if count <= max(found["all"])]
    return {
        "width": width,
        "height": height,
        "all": bars(found["all"]),
        "copied": bars(found["copied"]),
        "line": place(threshold) if threshold is not None and low <= threshold <= high else None,
        "ticks": [{"x": place(tick), "text": f"{tick:.3g}"} for tick in ticks],
        "counts": [{"y": round(height - height * math.log1p(n) / top, 2), "text": f"{n:,}"} for n in counts],
    }


def _short(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _count(value: int) -> str:
    return f"{value:,}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _file_name(path: str) -> str:
    """Last part of a path: a report is handed on, folders of the machine are nobody's business."""
    return path.rstrip("/").rsplit("/", 1)[-1] or path
