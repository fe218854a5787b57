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
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import COPIES, SCORES
from audit.run.select import best_rows, unlooked, unlooked_line
from audit.run.status import run_status
from audit.scores.cut import Cut, find_cut
from audit.scores.second_look import DEFAULT_SCORE_HELP, not_begun

SHOWN = 20  # captions that a dry run prints


@dataclass(frozen=True)
class DropConfig:
    """Whose verdicts, which table, where to. Every field is a flag of `be-audit drop`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    captions: tuple[str, ...] = option((), "Caption tables, parquet.", argument=True)
    output: str | None = option(
        None, "File or, of several, folder of the clean table; nothing is written without.", short="-o"
    )
    caption_col: str | None = option(None, "Caption column; found as scan finds it.")
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
            written (None in a dry run). examples: the first captions that were found. unfinished: what of the run is
            not done. left_out: reason -> files of the folders given that are no caption tables. above: the threshold
            that drops captions beside those with a verdict, in words.
    """

    captions: int
    files: list[tuple[str, int, int, str | None]]
    examples: list[str]
    unfinished: list[str]
    left_out: dict[str, int]
    above: str = ""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"left out: {reasons(self.left_out)}"] if self.left_out else []
        lines += [self.above] if self.above else []
        for path, rows, dropped, written in self.files:
            where = f", the other {rows - dropped:,} are in {written}" if written else " would go"
            lines.append(f"{path}: {dropped:,} of {rows:,} rows{' dropped' if written else ''}{where}")
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
    scanned = {file.path: file.caption_col for file in run.plan.files}
    named = config.caption_col or run.facts.config.get("caption_col")
    tables = [_table(source, scanned.get(source.path, named), config.caption_col) for source in found.sources]
    targets = _targets([file.path for file in tables], config.captions, config.output)
    files, examples = [], dict[str, None]()
    for file, target in zip(tables, targets, strict=True):
        dropped = _drop_rows(file, captions, target, examples)
        files.append((file.path, file.rows, dropped, target))
    unfinished = [
        f"{stage.stage}: {stage.done:,} of {stage.shards:,} shards are done"
        for stage in run_status(run.url).stages
        if not stage.complete
    ]
    above = "" if cut.threshold is None else f"captions above {cut.threshold:g} by {cut.by} go too, confirmed or not"
    return DropSummary(
        len(captions), files, list(examples), [*unfinished, *not_begun(run), *beyond], dict(found.left_out), above
    )


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


def _table(source: Source, scanned: str | None, named: str | None) -> CaptionFile:
    """A table as it is found: its captions are in the column named, else in the one the run took, where it has it."""
    if source.format != "parquet":
        raise AuditError(f"{source.path}: not parquet: `drop` keeps a table as it is, which it can with parquet alone")
    if named is None and scanned:
        with open_input(source.path) as opened, reading(source.path):
            named = scanned if scanned in open_parquet(source.path, opened).schema_arrow.names else None
    file = describe(source, named).file
    if file.lists:
        raise AuditError(f"{file.path}: {file.caption_col!r} holds lists of captions: make a row a caption first")
    return file


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
                        kept.append(batch.filter(pc.invert(found)))
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
