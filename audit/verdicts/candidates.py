"""Which captions a confirm generates images of: the suspects, and the clean ones its null is made of."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.errors import AuditError
from audit.base.fingerprint import digest
from audit.base.options import config_of, option
from audit.base.storage import Folder
from audit.captions import CaptionPlan, is_empty, plan_captions, read_shard
from audit.engines.config import EngineFlags
from audit.index.build import DEFAULT_INDEX
from audit.run.read import read_distinct, read_rows
from audit.run.run import DEFAULT_RUN, Run
from audit.run.schema import MASK_DETECTORS, MASKS, SCORES, STEADY_SCORE, WINDOWS
from audit.run.select import best_rows, unlooked, unlooked_line, with_images
from audit.scores.config import DEVICE_HELP, ScoreFlags
from audit.scores.cut import find_cut
from audit.scores.second_look import DEFAULT_SCORE_HELP
from audit.statistics.null import sample_needed

DEFAULT_TOP_K = 100
SHARD_IMAGES = 32  # trajectories a shard: what a kill can lose


@dataclass(frozen=True)
class CandidateFlags:
    """Which rows to confirm, against what, and how strictly."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    index: str = option(DEFAULT_INDEX, "Index of the training pictures.", envvar="BE_AUDIT_INDEX")
    sscd: str | None = option(None, "Copy descriptor file; default the one the index was made with.")
    by: str | None = option(
        None,
        f"Score the candidates are picked by; default that of --thresholds, else {DEFAULT_SCORE_HELP}.",
        choices=SCORES,
    )
    threshold: float | None = option(None, "Candidates: rows scored above this.")
    thresholds: str | None = option(None, "Candidates: rows above the threshold in this file (be-audit calibrate).")
    top_fraction: float | None = option(None, "Candidates: this fraction of the captions.", min=0.0, max=1.0)
    top_k: int | None = option(None, f"Candidates: this many; {DEFAULT_TOP_K} when nothing else is said.", min=1)
    num_images: int = option(1, "Images generated of every candidate.", min=1, max=4096)
    neighbours: int = option(10, "Nearest training pictures every image is compared with.", min=1)
    match_mask: str = option("energy", "Mask of the local verdict.", choices=tuple(MASKS))
    match_fpr: float = option(0.01, "False-positive rate of the local verdict.", min=1e-6, max=0.5)
    ls_threshold: float | None = option(None, "Local threshold of the correlation distance; default calibrated.")
    clean: str | None = option(None, "Calibrate on images of these captions, known to be clean: a file as scan takes.")
    null_captions: int | None = option(
        None,
        "Calibrate on images of this many: of --clean (default all), or the run's own beyond the candidates.",
        min=1,
    )
    null_pictures: int = option(1000, "Else on this many different training pictures, or more where K needs it.", min=1)
    device: str = option("auto", DEVICE_HELP)
    batch_size: int = option(32, "Latents in one U-Net call; halved when memory runs out.", min=1)
    replace: bool = option(False, "Discard an earlier confirm that was begun differently.")


@dataclass(frozen=True)
class ConfirmConfig(EngineFlags, CandidateFlags):
    """Which rows to confirm, how strictly, and where it runs. Every field is a flag of `be-audit confirm`."""


@dataclass(frozen=True)
class TrajectoriesFingerprint:
    """What the generated images depend on beside the run: which captions, and how many images of each.

    Attributes:
        by: score the candidates are picked by; candidates: how many; rows: digest of their ids.
        clean: digest of the clean captions the null is made of; null where it is made of training pictures.
        num_images: of every caption.
    """

    by: str
    candidates: int
    rows: str
    clean: str | None
    num_images: int


def choose(run: Run, config: ConfirmConfig) -> tuple[TrajectoriesFingerprint, pa.Table]:
    """The captions to generate images of.

    Returns:
        The fingerprint, and a row an image: row_id (negative for captions that are no rows of the run), caption, score,
        rank, clean, shard, image_index. Clean captions come last, in shards of their own.
    Raises:
        AuditError: nothing to confirm, or too few clean captions for the rate.
    """
    cut = find_cut(run, config.by, config.threshold, config.thresholds)
    if run.fingerprint.mask == "none":
        if config.match_mask != "energy":
            raise AuditError(f"--match-mask {config.match_mask}: the run's model has no attention masks: give energy")
        if cut.by in (*MASK_DETECTORS, *(name for name in WINDOWS if name.startswith("ld"))):
            raise AuditError(f"--by {cut.by}: the run's model has no attention masks: give {STEADY_SCORE}")
    top_k = config.top_k
    if top_k is None and cut.threshold is None and config.top_fraction is None:
        top_k = DEFAULT_TOP_K
    # not by what its own images tell, or a confirm that is gone on with would choose others
    chosen = best_rows(run, cut.by, top_k, config.top_fraction, cut.threshold, cut.num_noises, confirmed=False)
    if not chosen.num_rows:
        why = f"--top-fraction {config.top_fraction:g}" if config.top_fraction is not None else ""
        why = why if cut.threshold is None else f"no caption scores above {cut.threshold:g} by {cut.by}"
        raise AuditError(f"{run.url}: {why}: nothing to confirm")
    rows = digest({"row_ids": chosen["row_id"].to_pylist()})
    clean = _clean_captions(run, chosen, config)
    fingerprint = TrajectoriesFingerprint(
        by=cut.by,
        candidates=chosen.num_rows,
        rows=rows,
        clean=None if clean is None else digest({"captions": clean["caption"].to_pylist()}),
        num_images=config.num_images,
    )
    per_shard = max(1, SHARD_IMAGES // config.num_images)
    parts, first = [], 0
    for table, is_clean in ((chosen, False), (clean, True)):
        if table is not None:
            shards = pa.array(first + np.arange(table.num_rows) // per_shard, pa.int32())
            marks = pa.array(np.full(table.num_rows, is_clean))
            parts.append(table.append_column("clean", marks).append_column("shard", shards))
            first = shards[-1].as_py() + 1
    return fingerprint, with_images(pa.concat_tables(parts), config.num_images)


def passed_over(run: Run, config: ConfirmConfig) -> str:
    """What a thresholds file passed over, in words (`select.unlooked`); "" where nothing was."""
    if config.thresholds is None:
        return ""
    cut = find_cut(run, config.by, None, config.thresholds)
    assert cut.threshold is not None, "a file has one"
    count = unlooked(run, cut.by, cut.threshold, cut.num_noises)
    return unlooked_line(count, cut.by) if count else ""


def _clean_captions(run: Run, chosen: pa.Table, config: ConfirmConfig) -> pa.Table | None:
    """Captions of the null, like `chosen`; None where it is made of training pictures, or the threshold is given."""
    if config.ls_threshold is not None or (config.clean is None and config.null_captions is None):
        return None
    if config.clean is not None:
        where, known = f"--clean {config.clean}", _captions_of(config.clean, run)
        count = len(known)
    else:
        where, scored = run.url, read_distinct(run, ["row_id"])["row_id"]
        others = scored.filter(pc.invert(pc.is_in(scored, chosen["row_id"].combine_chunks())))
        count = len(others)
    taken = count if config.null_captions is None else min(count, config.null_captions)
    needed = sample_needed(config.match_fpr, 1)
    if taken < needed:
        few = f"{count:,} captions to make a null of" if count < needed else f"--null-captions {taken}"
        raise AuditError(
            f"{where}: {few}; a false-positive rate of {config.match_fpr:g} needs {needed:,}: give more, raise "
            "--match-fpr, or leave it to training pictures"
        )
    at = pa.array(np.sort(np.random.default_rng(run.fingerprint.seed).permutation(count)[:taken]))
    if config.clean is not None:
        captions, row_ids = known.take(at), pa.array(-1 - at.to_numpy())
    else:
        row_ids = others.take(at).combine_chunks()
        captions = read_rows(run, row_ids.to_numpy(), ["caption"])["caption"]
    unknown = pa.nulls(taken)
    columns = (row_ids, captions, unknown.cast(pa.float32()), unknown.cast(pa.int32()))
    return pa.table(dict(zip(chosen.schema.names, columns, strict=True)))


def _captions_of(file: str, run: Run) -> pa.ChunkedArray:
    """Distinct captions of a file, in order."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(scratch)
        plan = _plan_as_scanned(file, run, folder)
        print(f"--clean {file}: captions from {', '.join(plan.facts.caption_columns)}", file=sys.stderr)
        tables = pa.concat_tables(read_shard(plan, shard, folder) for shard in range(len(plan)))
    captions = tables["caption"].filter(pa.array(~is_empty(tables["caption"])))
    return pa.chunked_array([captions.unique()])


def _plan_as_scanned(file: str, run: Run, staging: Folder) -> CaptionPlan:
    """The plan of a file whose captions are in the column of the run's; where none has text there, as scan finds them.

    A text file may be written as the run's were, or be UTF-8 with a header all the same: that is tried first.
    """
    common: dict[str, Any] = {"keep_cols": (), "limit": None, "rows_per_shard": 1 << 16, "staging": staging}
    text = config_of(ScoreFlags, run.facts.config).text_format
    columns = dict.fromkeys(each.caption_col for each in run.plan.files if each.caption_col)
    encodings, headers = dict.fromkeys((None, text.encoding)), dict.fromkeys((True, text.header))
    for column, encoding, header in itertools.product(columns, encodings, headers):
        with contextlib.suppress(AuditError):
            form = replace(text, encoding=encoding, header=header)
            plan = plan_captions([file], caption_col=column, text_format=form, **common)
            if plan.num_unique:
                return plan
    return plan_captions([file], caption_col=None, **common)
