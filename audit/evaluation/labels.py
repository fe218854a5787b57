"""Labels from a file, joined to the captions of a run: what `be-audit evaluate` measures against."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
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


def match_labels(run: Run, config: EvaluateConfig, unfinished: Sequence[str] = ()) -> tuple[Truth, list[str]]:
    """Labels joined to the run's scored distinct captions, and notes on what was left out.

    Args:
        unfinished: what of the run is not done, if anything: what is missing may then still come.
    """
    if config.key is not None and config.key not in run.plan.keep_cols:
        kept = ", ".join(run.plan.keep_cols) or "none"
        raise AuditError(
            f"--key {config.key}: the run kept {kept}; scan with --keep-cols {config.key}, or join by caption"
        )
    labels = read_labels(config)
    _check_names(config, {label for label, _ in labels.values()})
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
        else:
            more = f" ({config.key or 'caption'} {name[:60]!r})"
            chosen[first] = _agreed(chosen.get(first), labels[name], f"{config.labels}: equal captions are", more)
    if not chosen:
        raise AuditError(
            f"{config.labels}: none of its {len(labels):,} {config.key or 'caption'}s is of a scored caption of "
            f"{run.url}: join by another --key, or name the right run{so_far(unfinished)}"
        )
    notes = []
    whole = len(np.unique(table["row_id"].to_numpy() >> 32)) == len(run.plan)
    scope = "of the run" if whole else "scanned so far"
    if len(matched) < len(labels):
        notes.append(f"{len(labels) - len(matched):,} of {len(labels):,} labels match no caption {scope}.")
    without = len(set(firsts)) - len(chosen)
    if without:
        notes.append(f"{without:,} distinct captions {scope} are not scored or have no label: left out.")
    if unscored:
        notes.append(f"{unscored:,} labelled rows have no scores (failed, empty or not scanned yet).")
    ids = np.array(sorted(chosen), np.int64)
    clusters = np.array([chosen[row][1] for row in ids], object) if config.cluster_col else None
    return Truth(ids, np.array([chosen[row][0] for row in ids], object), clusters), notes


def read_labels(config: EvaluateConfig) -> dict[str, tuple[str, str | None]]:
    """Caption or key -> (label, cluster), from any format that scan reads; rows without a label are left out.

    Raises:
        AuditError: no file, no such column or one that is no text, or one caption with two labels or two clusters.
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
        kind = schema.field(name).type if schema.names.count(name) == 1 else pa.string()
        if pa.types.is_nested(kind):
            raise AuditError(f"{config.labels}: {flag} {name}: the column is {kind}: name one with a value a row")
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
            columns = [table["caption"].to_pylist()]
            for flag, name in zip(("--label-col", "--cluster-col"), wanted, strict=False):
                columns.append(_as_text(table[name], f"{config.labels}: {flag} {name}"))
            for name, label, *cluster in zip(*columns, strict=True):
                if name is not None and label:
                    pair = (label, cluster[0] if cluster else None)
                    found[name] = _agreed(found.get(name), pair, f"{config.labels}: {name[:60]!r} is")
    return found


def _agreed(
    known: tuple[str, str | None] | None, other: tuple[str, str | None], who: str, more: str = ""
) -> tuple[str, str | None]:
    """Label and cluster of a caption that was met before, where both say the same; one that says none agrees.

    Raises:
        AuditError: they do not.
    """
    if known is None:
        return other
    if known[0] != other[0]:
        raise AuditError(f"{who} labelled {known[0]!r} and {other[0]!r}{more}: give a caption one label")
    if known[1] is not None and other[1] is not None and known[1] != other[1]:
        raise AuditError(f"{who} in the clusters {known[1]!r} and {other[1]!r}{more}: give a caption one cluster")
    return known[0], other[1] if known[1] is None else known[1]


def _as_text(column: pa.ChunkedArray, what: str) -> list[str | None]:
    """As strings without blanks around them; no number and blanks alone are no value."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        values = column.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        reason = "bytes that are not UTF-8" if isinstance(error, ValueError) else "no text and no number"
        raise AuditError(f"{what}: the column is {column.type}, {reason}: name a column of text") from error
    return [(value.strip() or None) if value is not None else None for value in values]


def _check_names(config: EvaluateConfig, there: set[str]) -> None:
    """Raise AuditError for a --clean or --positive that no label of the file is; --clean's default may name others."""
    known = {label.casefold() for label in there}
    default = next(place.default for place in fields(EvaluateConfig) if place.name == "clean")
    unknown = [name for name in config.clean if name.strip().casefold() not in known]
    if unknown and config.clean != default:
        raise AuditError(f"--clean {unknown[0]}: no such label; there are {', '.join(sorted(there)) or 'none'}")
    memorised = sorted(label for label in there if not is_clean(np.array([label], object), config)[0])
    unknown = [name for name in config.positive if name.strip() not in memorised]
    if unknown:
        raise AuditError(
            f"--positive {unknown[0]}: no such memorised label; there are {', '.join(memorised) or 'none'}"
        )


def so_far(unfinished: Sequence[str]) -> str:
    """What a message ends in where it may be so only because the run is not finished."""
    return f" (the run is not finished: {'; '.join(unfinished)})" if unfinished else ""


def is_clean(labels: NDArray[np.object_], config: EvaluateConfig) -> NDArray[np.bool_]:
    names = {name.strip().casefold() for name in config.clean}
    return np.array([str(label).casefold() in names for label in labels], bool)


def memorised_types(
    labels: NDArray[np.object_], config: EvaluateConfig, unfinished: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Type -> labels of it: `all` first where there are several, then each memorised label by itself.

    Raises:
        AuditError: no memorised or no clean caption.
    """
    clean, there = is_clean(labels, config), sorted(set(labels))
    memorised = sorted(set(labels[~clean]))
    wanted = {name.strip() for name in config.positive}
    memorised = [name for name in memorised if not wanted or name in wanted]
    if not memorised or not clean.any():
        missing, flag = ("clean", "--clean") if memorised else ("memorised", "--positive and --clean")
        raise AuditError(
            f"{config.labels}: no {missing} caption among {len(labels)}; their labels are {', '.join(there)}: "
            f"say which is which with {flag}{so_far(unfinished)}"
        )
    each = {name: [name] for name in memorised}
    return {"all": memorised, **each} if len(each) > 1 else each
