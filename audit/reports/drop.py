"""`be-audit drop`: a caption table without the rows whose captions reproduce training pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audit.base.errors import AuditError
from audit.base.options import option
from audit.base.parquet import open_parquet, rows_at_once
from audit.base.progress import Progress
from audit.base.storage import Folder
from audit.base.text import reasons
from audit.captions import find_captions
from audit.captions.files import CaptionFile, describe
from audit.captions.find import Source
from audit.captions.streams import BATCH_BYTES, BATCH_ROWS, open_input, reading
from audit.captions.values import text
from audit.reports.flagged import picked_by, read_verdicts
from audit.run.read import count_rows
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import COPIES, SCORES, VERDICTS
from audit.run.select import best_rows, unlooked, unlooked_line
from audit.run.stage import CONFIRM, TRAJECTORIES, Stage
from audit.run.status import RunStatus, run_status
from audit.scores.cut import Cut, find_cut
from audit.scores.second_look import DEFAULT_SCORE_HELP
from audit.verdicts.confirm import read_null

SHOWN = 20  # captions that a dry run prints


@dataclass(frozen=True)
class DropConfig:
    """Whose verdicts, which table, where to. Every field is a flag of `be-audit drop`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    captions: tuple[str, ...] = option((), "Caption tables, parquet.", argument=True)
    output: str | None = option(
        None, "File or, of several, folder of the clean table; nothing is written without.", short="-o"
    )
    caption_col: str | None = option(None, "Caption column; default the run's, else found as scan finds it.")
    by: str | None = option(
        None,
        f"Score of --threshold; default that of --thresholds, else of confirm, else {DEFAULT_SCORE_HELP}.",
        choices=SCORES,
    )
    threshold: float | None = option(None, "Drop the captions scored above this too, confirmed or not.")
    thresholds: str | None = option(None, "Drop those above the threshold in this file too (be-audit calibrate).")


@dataclass(frozen=True)
class DropSummary:
    """What was dropped, or would be.

    Attributes:
        captions: different captions to drop. files: of each table its path, rows and rows dropped, and where it was
            written (None in a dry run). columns: of each table the column its captions are in. examples: the first
            captions that were found. unfinished: what of the run is not done or could not be judged.
            left_out: reason -> files of the folders given that are no caption tables.
            above: the threshold that drops captions beside those with a verdict, in words.
    """

    captions: int
    files: list[tuple[str, int, int, str | None]]
    columns: list[str]
    examples: list[str]
    unfinished: list[str]
    left_out: dict[str, int]
    above: str = ""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"left out: {reasons(self.left_out)}"] if self.left_out else []
        lines += [self.above] if self.above else []
        for (path, rows, dropped, written), column in zip(self.files, self.columns, strict=True):
            where = f", the other {rows - dropped:,} are in {written}" if written else " would go"
            done = f"{dropped:,} of {rows:,} rows{' dropped' if written else ''}{where}"
            lines.append(f"{path}: {done}; captions: column {column!r}")
        if self.captions and not any(dropped for _, _, dropped, _ in self.files):
            lines.append(f"note: none of the {self.captions:,} captions to drop is in any table given (--caption-col?)")
        if not any(written for *_, written in self.files):
            lines += [f"  {example}" for example in self.examples]
            lines.append("Nothing was written: name the clean table with -o.")
        return lines


def drop(config: DropConfig) -> DropSummary:
    """Write caption tables without the captions a run found to be reproduced, repeats included; without -o, only tell.

    Rows are told by their caption, exactly as it is, so the table need not be the one that was scanned: it may have
    more columns or more rows. Row groups stay what they are, less the rows that go; so does the order.

    Raises:
        AuditError: no run, no verdicts and no threshold, a table that is not parquet, or an output that is there.
    """
    if not config.captions:
        raise AuditError("give the run and the caption tables: be-audit drop RUN CAPTIONS -o CLEAN")
    run = Run.open(config.run)
    cut = find_cut(run, config.by, config.threshold, config.thresholds, picked_by(run))
    flagged, beyond = _flagged_captions(run, cut, config.thresholds is None)
    captions = pa.array(flagged, pa.string())
    found = find_captions(config.captions)
    tables = [_table(source, run, config.caption_col, config.output is not None) for source in found.sources]
    targets = _targets([file.path for file in tables], config.captions, config.output)
    files, examples = [], dict[str, None]()
    for file, target in zip(tables, targets, strict=True):
        dropped = _drop_rows(file, captions, target, examples)
        files.append((file.path, file.rows, dropped, target))
    status = run_status(run.url)
    unfinished = [
        f"{stage.stage}: {stage.done:,} of {stage.shards:,} shards are done"
        for stage in status.stages
        if not stage.complete
    ]
    unfinished += [*status.not_begun.values(), *beyond, *_not_judged(run, status)]
    above = "" if cut.threshold is None else f"captions above {cut.threshold:g} by {cut.by} go too, confirmed or not"
    columns = [file.caption_col for file in tables]
    return DropSummary(len(captions), files, columns, list(examples), unfinished, dict(found.left_out), above)


def _flagged_captions(run: Run, cut: Cut, own: bool) -> tuple[list[str], list[str]]:
    """Captions with a verdict of a copy, and those above a threshold where one is given; and what that passed over.

    Args:
        own: scores are compared as confirm's images made them, too; a calibrated threshold is of the scan's.
    """
    verdicts = read_verdicts(run)
    if verdicts is None and cut.threshold is None:
        raise AuditError(
            f"{run.url}: no verdicts yet: run `be-audit confirm {run.url}`, or drop by score with --threshold"
        )
    found: dict[str, None] = {}
    if verdicts is not None:
        copies = verdicts.filter(pc.is_in(verdicts["verdict"], pa.array(COPIES)))
        found.update(dict.fromkeys(copies["caption"].to_pylist()))
    beyond = 0
    if cut.threshold is not None:
        above = best_rows(run, cut.by, threshold=cut.threshold, num_noises=cut.num_noises, confirmed=own)
        found.update(dict.fromkeys(above["caption"].to_pylist()))
        beyond = unlooked(run, cut.by, cut.threshold, cut.num_noises)
    return list(found), [unlooked_line(beyond, cut.by)] if beyond else []


def _not_judged(run: Run, status: RunStatus) -> list[str]:
    """What the run could not score or compare, one sentence each: those rows stay in the table, copies or not."""
    lines, stages = [], {stage.stage: stage.counts for stage in status.stages}
    if failed := count_rows(run)["error"]:
        lines.append(f"{failed:,} rows could not be scored (column `error` says why)")
    if failed := stages.get(TRAJECTORIES.name, {}).get("error", 0):
        lines.append(f"{failed:,} images could not be generated (column `error` of trajectories/ says why)")
    begun = Stage.find(run, CONFIRM)
    if begun is None:
        if Stage.find(run, TRAJECTORIES) is not None:
            lines.append("confirm was begun and has no verdicts yet")
        return lines
    verdicts, null = read_verdicts(run), read_null(run)
    told = [] if verdicts is None else [verdict for verdict in verdicts["verdict"].to_pylist() if verdict in VERDICTS]
    if undecided := begun.items.num_rows - len(told):
        lines.append(f"{undecided:,} candidates have no verdict: their images were not generated or not compared")
    if alone := told.count("no_reference"):
        lines.append(f"{alone:,} candidates could be compared with no training picture")
    if unread := stages.get(CONFIRM.name, {}).get("unreadable", 0):
        lines.append(f"{unread:,} comparisons decided nothing: the training pictures could not be read")
    if null is not None and null.missing:
        lines.append(
            f"{len(null.missing):,} training pictures that the local threshold should rest on could not be read"
        )
    return lines


def _table(source: Source, run: Run, asked: str | None, writes: bool) -> CaptionFile:
    """A table as it is found: its captions are in the column asked for, else in the one the run took, where it has it.

    The run's is that of the same file, else of its --caption-col, else the only one of its columns that is there.

    Args:
        writes: it is written, not only read: what cannot be is refused.
    """
    if source.format != "parquet":
        raise AuditError(f"{source.path}: not parquet: `drop` keeps a table as it is, which it can with parquet alone")
    with open_input(source.path) as opened, reading(source.path):
        schema = open_parquet(source.path, opened).schema_arrow
    named = asked
    if named is None:
        taken = {file.path: file.caption_col for file in run.plan.files}
        first = taken.get(source.path) or run.facts.config.get("caption_col")
        there = [first] if first in schema.names else sorted(set(taken.values()) & set(schema.names))
        named = there[0] if len(there) == 1 else None
    file = describe(source, named).file
    if file.lists:
        raise AuditError(f"{file.path}: {file.caption_col!r} holds lists of captions: make a row a caption first")
    for field in schema if writes else ():
        if not _is_view(field.type) and _holds_views(field.type):
            raise AuditError(
                f"{file.path}: column {field.name!r} is {field.type}, of which no rows can be left out: write it as "
                "string or binary"
            )
    return file


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _holds_views(kind: pa.DataType) -> bool:
    """Whether a type is a view of text or bytes, or is made of one."""
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_views(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_views(kind.value_type)
    return _is_view(kind) or any(_holds_views(kind.field(at).type) for at in range(kind.num_fields))


def _without(batch: pa.RecordBatch, found: pa.Array) -> pa.RecordBatch:
    """A batch without the rows that were found; views, of which pyarrow filters nothing, by way of what it does."""
    was = schema = batch.schema
    for at, field in enumerate(was):
        if _is_view(field.type):
            wide = pa.large_string() if pa.types.is_string_view(field.type) else pa.large_binary()
            schema = schema.set(at, field.with_type(wide))
    if schema is was:
        return batch.filter(pc.invert(found))
    return batch.cast(schema).filter(pc.invert(found)).cast(was)


def _targets(paths: list[str], inputs: Sequence[str], output: str | None) -> list[str | None]:
    """Where every table goes: the output itself for one file, below it as they lie for those of folders and several."""
    if output is None:
        return [None] * len(paths)
    folders = [path for path in inputs if _is_folder(path)]
    if len(paths) == 1 and not folders and not output.endswith("/") and not _is_folder(output):
        targets = [output]
    else:
        local = not any("://" in path for path in paths)
        top = os.path.commonpath([os.path.dirname(path) for path in paths]) if local else ""
        if top and folders and len(inputs) == 1:
            top = os.path.abspath(fsspec.core.url_to_fs(folders[0])[1])
        targets = [
            f"{output.rstrip('/')}/{path[len(top) :].lstrip('/') if top else path.rsplit('/', 1)[1]}" for path in paths
        ]
    if len(set(targets)) < len(targets):
        raise AuditError(f"-o {output}: two of the tables have one name: give them one after the other")
    for target in targets:
        fs, name = fsspec.core.url_to_fs(target)
        if fs.exists(name):
            raise AuditError(f"-o {target}: is there already: give a new name")
    return list(targets)


def _drop_rows(file: CaptionFile, captions: pa.Array, target: str | None, examples: dict[str, None]) -> int:
    """Rows of a table with one of the captions; without them the table is written to `target`, row group by row group.

    Raises:
        AuditError: it cannot be read, or not be written.
    """
    dropped = 0
    with open_input(file.path) as opened, reading(file.path), tempfile.TemporaryDirectory() as temporary:
        source = open_parquet(file.path, opened, buffer_size=1 << 20, pre_buffer=False)
        copy = Path(temporary, "clean.parquet")
        writer = None if target is None else _writer_like(source, copy)
        bar = Progress(source.num_row_groups, "row groups", "dropping")
        columns = None if writer else [file.caption_col]
        most = rows_at_once(source.metadata, columns or source.schema_arrow.names, BATCH_ROWS, BATCH_BYTES)
        with bar:
            for group in range(source.num_row_groups):
                kept = []
                for batch in source.iter_batches(most, row_groups=[group], columns=columns, use_threads=False):
                    values = text(batch.column(batch.schema.get_field_index(file.caption_col)))
                    found = pc.is_in(values, value_set=captions)
                    dropped += pc.sum(found).as_py() or 0
                    for caption in values.filter(found).slice(0, SHOWN).to_pylist():
                        if len(examples) < SHOWN:
                            examples[caption] = None
                    if writer is not None:
                        kept.append(_without(batch, found))
                if writer is not None:
                    rest = pa.Table.from_batches(kept, source.schema_arrow)
                    writer.write_table(rest, row_group_size=max(rest.num_rows, 1))
                bar.add(1)
        if writer is not None and target is not None:
            writer.close()
            folder, _, name = target.rpartition("/")
            Folder(folder or ".").put(name, copy)
    return dropped


def _is_folder(path: str) -> bool:
    fs, name = fsspec.core.url_to_fs(path)
    return bool(fs.isdir(name))


def _writer_like(source: pq.ParquetFile, path: Path) -> pq.ParquetWriter:
    """A writer with the schema, the metadata and the compression of a file."""
    metadata = source.metadata
    codecs, nested, int96 = {}, False, False
    if metadata.num_row_groups:
        for at in range(metadata.num_columns):
            column = metadata.row_group(0).column(at)
            codecs[column.path_in_schema] = column.compression
            nested = nested or ".list.item" in column.path_in_schema
            int96 = int96 or column.physical_type == "INT96"
    known = {codec.lower() if codec != "UNCOMPRESSED" else "none" for codec in codecs.values()}
    compression = (
        next(iter(known))
        if len(known) == 1
        else {name: "none" if codec == "UNCOMPRESSED" else codec.lower() for name, codec in codecs.items()}
    )
    return pq.ParquetWriter(
        path,
        source.schema_arrow,
        compression=compression or "snappy",
        use_compliant_nested_type=not nested,
        use_deprecated_int96_timestamps=int96,  # as Spark and Hive write all of theirs
        sorting_columns=(metadata.row_group(0).sorting_columns or None) if metadata.num_row_groups else None,
    )
