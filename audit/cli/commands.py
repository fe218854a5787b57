"""The be-audit command: one thin function a subcommand."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from audit.base.errors import AuditError
from audit.base.options import config_of, given_beside, options_from
from audit.base.stopping import stop_on_signals
from audit.base.storage import Folder, check_kept
from audit.base.text import reasons
from audit.cli.demo import DemoConfig
from audit.cli.demo import demo as run_demo
from audit.cli.doctor import doctor
from audit.cli.group import Commands
from audit.evaluation.config import EvaluateConfig
from audit.evaluation.evaluate import evaluate as run_evaluate
from audit.index import DEFAULT_INDEX, IndexConfig, build_index, search_image, verify_index
from audit.index import index_info as read_index_info
from audit.mitigation.mitigate import MitigateConfig
from audit.mitigation.mitigate import mitigate as run_mitigate
from audit.mitigation.prompt import MitigatePromptConfig, mitigate_prompt
from audit.reports.drop import DropConfig
from audit.reports.drop import drop as drop_rows
from audit.reports.report import ReportConfig
from audit.reports.report import report as write_report
from audit.reports.sql import answer_as, queries, question, run_query
from audit.run.run import DEFAULT_RUN
from audit.run.status import run_status
from audit.run.verify import verify_run
from audit.scores.calibrate import CalibrateConfig
from audit.scores.calibrate import calibrate as run_calibrate
from audit.scores.estimate import estimate
from audit.scores.prompt import ScoreConfig
from audit.scores.prompt import score as score_prompt
from audit.scores.scan import ScanConfig
from audit.scores.scan import scan as run_scan
from audit.verdicts.confirm import ConfirmConfig
from audit.verdicts.confirm import confirm as run_confirm

SQL_FORMATS = ("table", "csv", "json", "parquet")
RUN_ARGUMENT = click.argument("run", required=False, default=DEFAULT_RUN, envvar="BE_AUDIT_RUN")


def _note(line: str) -> None:
    """Beside the results: what will be done, before it is."""
    click.echo(line, err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="be-audit")
def cli() -> None:
    """Find the captions a text-to-image model reproduces training images for, where in the picture, with proof.

    The usual order: scan, index build, confirm, report. RUN is ./be-audit-run or $BE_AUDIT_RUN where it is not named,
    the index ./be-audit-index or $BE_AUDIT_INDEX.
    """


@cli.command()
@options_from(DemoConfig)
@click.pass_context
def demo(ctx: click.Context, **values: Any) -> None:
    """Run the whole audit on the embedded testbed, to its report."""

    with stop_on_signals() as stop:
        ctx.exit(run_demo(config_of(DemoConfig, values), click.echo, stop))


@cli.command()
@options_from(ScanConfig)
@click.pass_context
def scan(ctx: click.Context, **values: Any) -> None:
    """Score every caption at the first sampling step.

    Typed again, it goes on where it stopped. CAPTIONS are parquet, Arrow, JSON, CSV or TSV files, folders, globs or
    names of data sets.
    """

    config = config_of(ScanConfig, values)
    if config.dry_run:
        found = estimate(config, click.echo)
        click.echo("\n".join(found.lines(config)))
        ctx.exit(found.exit_code)
    with stop_on_signals() as stop:
        done = run_scan(config, stop, _note)
    if not done.committed_now and done.complete:
        click.echo(f"{done.output}: nothing to do, all {done.shards} shards of {done.rows:,} rows are done.")
    else:
        click.echo(
            f"{done.output}: {done.committed_before + done.committed_now} of {done.shards} shards done "
            f"({done.committed_now} now, {done.seconds:.1f} s)."
        )
    words = {"ok": "scored", "duplicate": "duplicates", "empty": "empty", "error": "failed"}
    counts = ", ".join(f"{done.counts.get(key, 0):,} {word}" for key, word in words.items())
    click.echo(f"{done.rows:,} rows, {done.unique:,} unique captions: {counts}.")
    if not done.unique:
        click.echo("No caption has text: nothing was scored; pass another --caption-col?", err=True)
    if done.looked:
        click.echo(
            f"{done.looked:,} best-scored rows looked at again, with {config.second_look_noises} noises "
            f"(--second-look {config.second_look:g})."
        )
    if done.look_failed:
        click.echo(f"{done.look_failed:,} rows failed at the second look and keep their first scores.", err=True)
    if done.refined:
        click.echo(f"{done.refined:,} trajectories of the best-scored rows (--refine {config.refine:g}).")
    if done.refine_pending:
        click.echo("--refine waits for the shards that are not done: give the command again then.", err=True)
    if done.quarantined:
        click.echo(
            f"Given up: shards {', '.join(map(str, done.quarantined))}; why: be-audit status {done.output}", err=True
        )
    ctx.exit(done.exit_code)


@cli.command()
@options_from(ConfirmConfig)
@click.pass_context
def confirm(ctx: click.Context, **values: Any) -> None:
    """Regenerate the best-scored captions; decide what is copied.

    From which picture, and where in it, is decided too.

    Needs an index of the training pictures: be-audit index build.
    """

    with stop_on_signals() as stop:
        done = run_confirm(config_of(ConfirmConfig, values), stop)
    click.echo("\n".join(done.lines()))
    ctx.exit(done.exit_code)


@cli.group()
def index() -> None:
    """Index the training pictures by copy descriptor (SSCD)."""


@index.command("build")
@options_from(IndexConfig)
@click.pass_context
def index_build(ctx: click.Context, **values: Any) -> None:
    """Describe every picture and build the search index; a killed build goes on where it was.

    IMAGES are folders, .tar shards of img2dataset, parquet, saved or hub data sets, or embeddings already computed.
    """

    check_kept(Folder(values["output"]))
    with stop_on_signals() as stop:
        done = build_index(config_of(IndexConfig, values), stop)
    used = done.info.descriptor
    click.echo(f"{done.index}: {done.ok:,} of {done.rows:,} pictures indexed, type {done.info.type}.")
    click.echo(f"Described by {used.name}, {used.preprocessing['resize']}.")
    for line in done.columns:
        click.echo(f"Columns: {line}.")
    if done.again:
        click.echo(f"{done.again:,} of {done.parts:,} parts were described again: their pictures have changed.")
    if done.info.left_out:
        click.echo(f"left out: {reasons(done.info.left_out)}", err=True)
    for line in done.error_examples:
        click.echo(f"not readable: {line}", err=True)
    ctx.exit(3 if done.errors else 0)


@index.command("info")
@click.argument("path", required=False, default=DEFAULT_INDEX, envvar="BE_AUDIT_INDEX")
def index_info(path: str) -> None:
    """Print key, size, recall and descriptor of an index, as JSON."""

    click.echo(json.dumps(asdict(read_index_info(path)), indent=1))


@index.command("search")
@click.argument("image")
@click.option("--index", "path", default=DEFAULT_INDEX, envvar="BE_AUDIT_INDEX", show_default=True)
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@click.option("--sscd", help="Copy descriptor file; default the one the index was made with.")
@click.option("--device", default="auto", show_default=True)
def index_search(image: str, path: str, k: int, sscd: str | None, device: str) -> None:
    """Print the training pictures nearest to an image, one JSON object a line."""

    for row in search_image(path, image, k, sscd, device):
        click.echo(json.dumps(row))


@index.command("verify")
@click.argument("path", required=False, default=DEFAULT_INDEX, envvar="BE_AUDIT_INDEX")
@click.option("--deep", is_flag=True, help="Also read and hash everything.")
@click.option("--repair", is_flag=True, help="Drop damaged parts: the next build makes just those again.")
@click.pass_context
def index_verify(ctx: click.Context, path: str, deep: bool, repair: bool) -> None:
    """Check that every part of an index is there and whole."""

    problems = verify_index(path, deep, repair)
    for line in problems:
        click.echo(line, err=True)
    click.echo(f"{path}: " + (f"{len(problems)} problems." if problems else "whole."))
    ctx.exit(3 if problems else 0)


@cli.command()
@options_from(MitigateConfig, MitigatePromptConfig)
@click.pass_context
def mitigate(ctx: click.Context, **values: Any) -> None:
    """Change the prompts of copies until they no longer copy.

    Works on the copies confirm found in RUN, or on one --prompt. Typed again, it goes on where it stopped.
    """

    if values["prompt"] is not None:
        if flag := given_beside(ctx, MitigatePromptConfig):
            raise AuditError(f"{flag}: goes with a run, not with --prompt: leave one of them out")
        config = config_of(MitigatePromptConfig, values)
        for name, (before, after) in mitigate_prompt(config).items():
            click.echo(f"{name:<10} {before:10.4g} -> {after:.4g}")
        click.echo(f"drawn to {config.output}")
        return
    if flag := given_beside(ctx, MitigateConfig):
        raise AuditError(f"{flag}: goes with --prompt TEXT: give that, or leave it out")
    with stop_on_signals() as stop:
        done = run_mitigate(config_of(MitigateConfig, values), stop)
    click.echo("\n".join(done.lines()))
    ctx.exit(done.exit_code)


@cli.command()
@options_from(ReportConfig)
@click.pass_context
def report(ctx: click.Context, **values: Any) -> None:
    """Write the HTML report, tables, and the rows to drop.

    Works on a run in progress too, says so on its first screen, and then exits 3.
    """

    if values["output"] is not None:
        check_kept(Folder(values["output"]))
    done = write_report(config_of(ReportConfig, values))
    counts = ", ".join(f"{count:,} {name}" for name, count in done.verdicts.items() if count)
    click.echo(f"{done.listed:,} flagged captions, {done.templates:,} findings" + (f": {counts}." if counts else "."))
    for line in done.unfinished:
        click.echo(f"not finished: {line}", err=True)
    click.echo(f"Report: {done.html or done.output}")
    ctx.exit(3 if done.unfinished else 0)


@cli.command()
@options_from(DropConfig)
@click.pass_context
def drop(ctx: click.Context, **values: Any) -> None:
    """Write a caption table without what was found.

    Rows go whose caption reproduces a training picture (verdicts global and local), repeats included; columns, order
    and row groups stay. Without -o it only says what would go. Of a run that is not finished it exits 3.
    """

    done = drop_rows(config_of(DropConfig, values))
    for line in done.unfinished:
        click.echo(f"not finished: {line}", err=True)
    click.echo("\n".join(done.lines()))
    ctx.exit(3 if done.unfinished else 0)


@cli.command()
@options_from(CalibrateConfig)
@click.pass_context
def calibrate(ctx: click.Context, **values: Any) -> None:
    """Find thresholds at a chosen false-positive rate.

    They are the scores that this share of clean captions exceeds, for --thresholds of confirm and report.

    CAPTIONS are known to be clean; they are scanned with the flags below, which must be those of the scans they are
    for. Or give the run of a scan of clean captions.
    """

    with stop_on_signals() as stop:
        done = run_calibrate(config_of(CalibrateConfig, values), stop, _note)
    click.echo("\n".join(done.lines()))
    ctx.exit(done.exit_code)


@cli.command()
@options_from(EvaluateConfig)
@click.pass_context
def evaluate(ctx: click.Context, **values: Any) -> None:
    """Measure every score and verdict of a run against labels.

    AUC, best F1, TPR at a low FPR, with bootstrap intervals, and plots. Of a run that is not finished it exits 3.
    """

    done = run_evaluate(config_of(EvaluateConfig, values))
    click.echo("\n".join(done.lines()))
    click.echo(f"Written: {', '.join(done.files)}")
    ctx.exit(done.exit_code)


@cli.command()
@options_from(ScoreConfig)
def score(**values: Any) -> None:
    """Print every score of one prompt and draw its masks.

    ld is LD under the attention mask of the first step, ld_energy under the energy mask, ld_first (--trajectory) under
    the paper's BE mask.
    """

    config = config_of(ScoreConfig, values)
    for name, value in score_prompt(config).items():
        click.echo(f"{name:<18} {value:.6g}")
    click.echo(f"drawn to {config.output}")


@cli.command()
@RUN_ARGUMENT
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", type=click.FloatRange(min=0.1), help="Print again every so many seconds until it is done.")
@click.pass_context
def status(ctx: click.Context, run: str, as_json: bool, watch: float | None) -> None:
    """Say how far a run is, from its commits alone."""

    while True:
        found = run_status(run)
        click.echo(json.dumps(found.to_dict()) if as_json else "\n".join(found.lines()))
        if watch is None or found.complete:
            break
        time.sleep(watch)
    ctx.exit(found.exit_code)


@cli.command()
@RUN_ARGUMENT
@click.option("--deep", is_flag=True, help="Also read every row: ids, captions against the input, duplicates, scores.")
@click.option("--repair", is_flag=True, help="Redo just the shards that are damaged or missing.")
@click.pass_context
def verify(ctx: click.Context, run: str, deep: bool, repair: bool) -> None:
    """Check that every shard is there and whole."""

    with stop_on_signals() as stop:
        found = verify_run(run, deep=deep, repair=repair, stop=stop)
    for line in found.problems:
        click.echo(line, err=True)
    click.echo(found.summary)
    ctx.exit(0 if found.whole else 3)


@cli.command("doctor")
@click.option(
    "-o", "--output", default=DEFAULT_RUN, envvar="BE_AUDIT_RUN", show_default=True, help="Where runs will go."
)
@click.pass_context
def run_doctor(ctx: click.Context, output: str) -> None:
    """Say what this machine has and lacks for an audit: versions, devices, memory, disk, models, extras."""

    lines, whole = doctor(output)
    click.echo("\n".join(lines))
    ctx.exit(0 if whole else 3)


@cli.command()
@click.argument("query", required=False)
@RUN_ARGUMENT
@click.option("--format", "kind", type=click.Choice(SQL_FORMATS), default="table", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write to a file, not to stdout.")
@click.option(
    "--memory", help="What DuckDB may hold, as 4GB; more goes to TMPDIR. Default four fifths of the machine's."
)
def sql(query: str | None, run: str, kind: str, output: str | None, memory: str | None) -> None:
    """Ask a run a question in SQL (DuckDB, read-only).

    Works on a run in progress.

    QUERY is a name or a file; without one, the queries are listed. Views: scores, trajectories, confirmed, matches,
    mitigated, commits, attempts.
    """

    if query is None:
        for name, text in queries().items():
            click.echo(f"{name:<12} {question(text)}")
        return
    answer = answer_as(run_query(query, run, memory), kind)
    if output is not None:
        try:
            Path(output).write_bytes(answer)
        except OSError as error:
            raise AuditError(f"-o {output}: cannot be written: {error.strerror or error}") from error
    else:
        sys.stdout.buffer.write(answer)
