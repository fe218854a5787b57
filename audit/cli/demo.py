"""`be-audit demo`: the whole audit on the embedded testbed, whose truth is known."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from audit import testbed
from audit.base.options import option
from audit.base.stopping import Stop
from audit.index import IndexConfig, build_index
from audit.reports.report import ReportConfig, report
from audit.run.run import Run
from audit.run.select import best_rows
from audit.scores.scan import ScanConfig, scan
from audit.scores.second_look import default_score
from audit.verdicts.confirm import ConfirmConfig, confirm

COPIED = 0.15  # a copy_error below this is a copy that anyone sees (audit/testbed/README.md)
SHOWN = 20


@dataclass(frozen=True)
class DemoConfig:
    """Every field is a flag of `be-audit demo`."""

    output: str = option("be-audit-demo", "Run folder; the index goes beside it, as OUTPUT-index.", short="-o")
    top_k: int = option(24, "Captions to confirm.", min=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    open: bool = option(False, "Open the report in the browser.")


def demo(config: DemoConfig, say: Callable[[str], None], stop: Stop | None = None) -> int:
    """Scan, index, confirm and report on the testbed; each part tells what it found. Returns the exit code."""
    say("1/4 scan: first-step scores of the testbed's 1,258 captions")
    scanned = scan(
        ScanConfig(
            captions=(str(testbed.CAPTIONS),),
            output=config.output,
            model="testbed",
            device=config.device,
            keep_cols=("URL", "label", "cluster", "copy_error"),
            rows_per_shard=256,
            rank=0,
            world_size=1,
        ),
        stop,
    )
    for line in ranking_lines(Run.open(config.output)):
        say(line)
    say("2/4 index: descriptors of the 1,152 training pictures")
    index = f"{config.output.rstrip('/')}-index"
    build_index(IndexConfig(images=(str(testbed.PICTURES),), output=index, sscd="testbed", device=config.device))
    say(f"3/4 confirm: the {config.top_k} best-scored captions are generated and compared with the training pictures")
    confirmed = confirm(
        ConfirmConfig(run=config.output, index=index, top_k=config.top_k, match_fpr=0.05, device=config.device), stop
    )
    for line in confirmed.lines():
        say(line)
    say("4/4 report")
    say(_report(config))
    return max(scanned.exit_code, confirmed.exit_code)


def ranking_lines(run: Run) -> list[str]:
    """The best-scored captions with their true labels, and how many of the best are truly memorised."""
    by = default_score(run)
    ranked = best_rows(run, by).to_pylist()
    truth = {row["TEXT"]: row for row in pq.read_table(testbed.CAPTIONS).to_pylist()}
    rows = [(row, truth[row["caption"]]) for row in ranked]
    copied = [fact["copy_error"] is not None and fact["copy_error"] < COPIED for _, fact in rows]
    total = sum(copied)
    lines = [f"{'rank':>4}  {by:>9}  {'label':<6}  {'copied':<6}  caption"]
    for (row, fact), is_copy in list(zip(rows, copied, strict=True))[:SHOWN]:
        caption = row["caption"] if len(row["caption"]) < 60 else row["caption"][:57] + "..."
        yes = "yes" if is_copy else "no"
        lines.append(f"{row['rank'] + 1:>4}  {row['score']:>9.4f}  {fact['label']:<6}  {yes:<6}  {caption}")
    found = sum(copied[:total])
    lines.append(f"{total} of {len(rows):,} captions are truly copied (measured); {found} are among the {total} best.")
    return lines


def _report(config: DemoConfig) -> str:
    path = str(report(ReportConfig(run=config.output)).html)
    if config.open:
        webbrowser.open(path if "://" in path else Path(path).resolve().as_uri())
    return f"Report: {path}"
