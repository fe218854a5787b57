"""Labels from a file, joined to the captions of a run: what `be-audit evaluate` measures against."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.captions import find_captions, plan_captions, read_shard
from audit.captions.files import describe
from audit.evaluation.config import EvaluateConfig
from audit.run.read import read_scores
from audit.run.run import Run


@dataclass(frozen=True)
class Truth:
    """Distinct captions with a label, n of them: their row ids (first occurrence), labels and clusters."""

    row_ids: NDArray[np.int64]
    labels: NDArray[np.object_]
    clusters: NDArray[np.object_] | None


def match_labels(run: Run, config: EvaluateConfig) -> tuple[Truth, list[str]]:
    """Labels joined to the run's scored distinct captions, and notes on what was left out."""
    if config.key is not None and config.key not in run.plan.keep_cols:
        kept = ", ".join(run.plan.keep_cols) or "none"
        raise AuditError(
            f"--key {config.key}: the run kept {kept}; scan with --keep-cols {config.key}, or join by caption"
        )
    labels = read_labels(config)
    columns = ["row_id", "caption", "status", "duplicate_of"]
    table = read_scores(run, [*columns, *([config.key] if config.key else [])])
    names = table[config.key or "caption"].cast(pa.string()).to_pylist()
    firsts = pc.coalesce(table["duplicate_of"], table["row_id"]).to_pylist()
    chosen: dict[int, tuple[str, Any]] = {}
    matched, unscored = set(), 0
    for name, first, status in zip(names, firsts, table["status"].to_pylist(), strict=True):
        if name not in labels:
            continue
        matched.add(name)
        if status != "ok":
            unscored += 1
        elif chosen.setdefault(first, labels[name])[0] != labels[name][0]:
            raise AuditError(
                f"{config.labels}: equal captions are labelled {chosen[first][0]!r} and {labels[name][0]!r} "
                f"({config.key or 'caption'} {name[:60]!r}): give a caption one label"
            )
    if not chosen:
        raise AuditError(
            f"{config.labels}: none of its {len(labels):,} {config.key or 'caption'}s is of a scored caption of "
            f"{run.url}: join by another --key, or name the right run"
        )
    notes = []
    if len(matched) < len(labels):
        notes.append(f"{len(labels) - len(matched):,} of {len(labels):,} labels match no caption of the run.")
    without = len(set(firsts)) - len(chosen)
    if without:
        notes.append(f"{without:,} distinct captions of the run are not scored or have no label: left out.")
    if unscored:
        notes.append(f"{unscored:,} labelled rows have no scores (failed, empty or not scanned yet).")
    ids = np.array(sorted(chosen), np.int64)
    clusters = np.array([chosen[row][1] for row in ids], object) if config.cluster_col else None
    return Truth(ids, np.array([chosen[row][0] for row in ids], object), clusters), notes


def read_labels(config: EvaluateConfig) -> dict[str, tuple[str, str | None]]:
    """Caption or key -> (label, cluster), from any format that scan reads; rows without a label are left out.

    Raises:
        AuditError: no file, no such column, or one caption with two labels.
    """
    if config.labels is None:
        raise AuditError("--labels FILE: give a file with a caption and a label a row")
    wanted = [name for name in (config.label_col, config.cluster_col) if name]
    joined_by = config.key or config.caption_col  # read as captions are: text, in any format of theirs
    flag = "--key" if config.key else "--caption-col"
    schema = describe(find_captions([config.labels]).sources[0], joined_by, flag).schema
    for flag, name in zip(("--label-col", "--cluster-col"), wanted, strict=False):
        if name not in schema.names:
            raise AuditError(f"{config.labels}: no column {name!r}; it has {', '.join(schema.names)}: pass {flag} NAME")
        if name == "caption":  # what is joined by has this name here
            raise AuditError(f"{config.labels}: {flag} caption: give the column another name")
    found: dict[str, tuple[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        staging = Folder(temporary)
        plan = plan_captions(
            [config.labels],
            caption_col=joined_by,
            keep_cols=wanted,
            limit=None,
            rows_per_shard=1 << 20,
            staging=staging,
        )
        for shard in range(len(plan)):
            table = read_shard(plan, shard, staging)
            columns = [_as_text(table[name]).to_pylist() for name in ("caption", *wanted)]
            for name, label, *cluster in zip(*columns, strict=True):
                if name is None or not label:
                    continue
                pair = (label, cluster[0] if cluster else None)
                if found.setdefault(name, pair)[0] != label:
                    raise AuditError(
                        f"{config.labels}: {name[:60]!r} is labelled {found[name][0]!r} and {label!r}: "
                        "give it one label"
                    )
    return found


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As strings; no number is no label."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column.cast(pa.string())


def is_clean(labels: NDArray[np.object_], config: EvaluateConfig) -> NDArray[np.bool_]:
    names = {name.casefold() for name in config.clean}
    return np.array([str(label).casefold() in names for label in labels], bool)


def memorised_types(labels: NDArray[np.object_], config: EvaluateConfig) -> dict[str, list[str]]:
    """Type -> labels of it: `all` first where there are several, then each memorised label by itself.

    Raises:
        AuditError: no memorised or no clean caption, or a --positive that no caption has.
    """
    clean, there = is_clean(labels, config), sorted(set(labels))
    memorised = sorted(set(labels[~clean]))
    unknown = [name for name in config.positive if name not in memorised]
    if unknown:
        raise AuditError(
            f"--positive {unknown[0]}: no such memorised label; there are {', '.join(memorised) or 'none'}"
        )
    memorised = [name for name in memorised if not config.positive or name in config.positive]
    if not memorised or not clean.any():
        missing, flag = ("clean", "--clean") if memorised else ("memorised", "--positive and --clean")
        raise AuditError(
            f"{config.labels}: no {missing} caption among {len(labels)}; their labels are {', '.join(there)}: "
            f"say which is which with {flag}"
        )
    each = {name: [name] for name in memorised}
    return {"all": memorised, **each} if len(each) > 1 else each
