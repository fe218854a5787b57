"""`be-audit report`: a folder people can open, sort, print and hand on, and the same rows for machines."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from audit.base.claims import CLAIMS, held
from audit.base.errors import AuditError
from audit.base.options import option
from audit.base.storage import Folder, join
from audit.reports.export import EXPORTS, make_exports, table_as
from audit.reports.facts import report_facts
from audit.reports.flagged import find_flagged, picked_by
from audit.reports.html import write_page
from audit.reports.statement import write_statement
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import SCORES
from audit.scores.cut import find_cut
from audit.scores.second_look import DEFAULT_SCORE_HELP

FORMATS = ("html", *EXPORTS)
_OURS = (
    "index.html",
    "data.js",
    "rows",
    "pictures",
    "exports",
    "statement.md",
    "summary.json",
    "report.css",
    "report.js",
    "icon.svg",
)


_FACTS = {"format", "made", "run", "created", "digest", "version", "scanned", "verdicts"}  # of every version's facts


@dataclass(frozen=True)
class ReportConfig:
    """Of which run, which rows, in which formats. Every field is a flag of `be-audit report`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    output: str | None = option(None, "Folder of the report (any fsspec URL); default RUN/report.", short="-o")
    format: tuple[str, ...] = option(FORMATS, f"Any of {', '.join(FORMATS)}; comma-separated.")
    by: str | None = option(
        None,
        f"Score the rows are ranked by; default that of --thresholds, else of confirm, else {DEFAULT_SCORE_HELP}.",
        choices=SCORES,
    )
    threshold: float | None = option(None, "List the captions scored above this, beside confirm's candidates.")
    thresholds: str | None = option(None, "List those above the threshold in this file (be-audit calibrate).")
    top_k: int | None = option(
        None,
        "List this many at most; default a tenth of the captions up to 1000, or all above the threshold.",
        min=0,
        max=50_000,
    )


@dataclass(frozen=True)
class ReportSummary:
    """What a report holds.

    Attributes:
        output: its folder. html: path of index.html, None without it. files: exports and statement written, by path.
        listed: flagged captions listed, in `templates` groups. verdicts: how many of each. unfinished: what of the
            run is not done, a sentence each.
    """

    output: str
    html: str | None
    files: list[str]
    listed: int
    templates: int
    verdicts: dict[str, int]
    unfinished: list[str]
    seconds: float


def report(config: ReportConfig) -> ReportSummary:
    """Write the report of a run, finished or not; an earlier report in the same folder is replaced.

    Raises:
        AuditError: no run, nothing scored yet, an unknown format, or a folder with other things in it.
    """
    started = time.monotonic()
    unknown = [name for name in config.format if name not in FORMATS]
    if unknown or not config.format:
        raise AuditError(f"--format {','.join(config.format)}: give any of {','.join(FORMATS)}")
    run = Run.open(config.run)
    folder = Folder(config.output or join(config.run, "report"))
    _check_output(folder)
    cut = find_cut(run, config.by, config.threshold, config.thresholds, picked_by(run))
    own = config.thresholds is None  # a calibrated one is of the scan's scores, not of confirm's images
    flagged = find_flagged(run, cut.by, cut.threshold, config.top_k, cut.num_noises, confirmed=own)
    facts = report_facts(run, flagged)
    exports = [name for name in config.format if name != "html"]
    tables = {"flagged": flagged.table, "denylist": flagged.deny}
    made = make_exports(tables, exports, facts) if exports else {}  # before anything of an earlier report goes
    if "parquet" in exports and flagged.candidates.num_rows:
        made["exports/candidates.parquet"] = table_as(flagged.candidates, "parquet")
    files = list(made)
    with held(folder, CLAIMS, asdict(run.fingerprint), lambda: False, "writes a report here", None):
        for name in _OURS:
            folder.remove(name)
        folder.write("report.json", json.dumps(facts, indent=1).encode())  # first: it marks the folder as ours
        for name, data in made.items():
            folder.write(name, data)
        stated = write_statement(folder, facts)
        if "html" in config.format:
            write_page(run, folder, flagged, facts, files)
    return ReportSummary(
        output=folder.url,
        html=join(folder.url, "index.html") if "html" in config.format else None,
        files=[join(folder.url, name) for name in (*files, *stated)],
        listed=facts["listed"],
        templates=facts["templates"],
        verdicts=facts["verdicts"],
        unfinished=facts["unfinished"],
        seconds=time.monotonic() - started,
    )


def _check_output(folder: Folder) -> None:
    """Refuse a folder that holds anything but a report.

    Raises:
        AuditError: it is a file, or has other things in it.
    """
    if folder.local and folder.fs.isfile(folder.root):
        raise AuditError(f"-o {folder.url}: is a file; give a folder")
    there = [name for name in folder.list() if not name.startswith(".") and name != CLAIMS]
    if there and not ("report.json" in there and _is_report(folder)):
        seen = "a report.json of something else" if "report.json" in there else there[0]
        raise AuditError(f"-o {folder.url}: not empty and not a report (it has {seen}); give a new folder")
    folder.sweep()  # of a report that was killed


def _is_report(folder: Folder) -> bool:
    """Whether report.json is one of ours. Ours is written first and atomically: never torn, wherever a report ended."""
    try:
        found = json.loads(folder.read("report.json"))
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= _FACTS
