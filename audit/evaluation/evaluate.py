"""`be-audit evaluate`: how well every score of a run tells memorised captions from clean ones, by labels you have."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.base.progress import Progress
from audit.base.storage import Folder, join
from audit.base.text import grid, plain_text
from audit.evaluation.config import EvaluateConfig
from audit.evaluation.labels import Truth, is_clean, match_labels, memorised_types
from audit.evaluation.plots import distribution_plot, roc_plot
from audit.evaluation.series import (
    BASELINE,
    NOT_CONFIRMED,
    SECOND_LOOK,
    UNDECIDED,
    Series,
    aligned,
    covered,
    find_series,
)
from audit.run.read import read_stage
from audit.run.run import Run, check_writable
from audit.run.stage import CONFIRM, MITIGATE, TRAJECTORIES, Stage
from audit.run.status import run_status
from audit.statistics.intervals import Statistic, cluster_bootstrap, paired_bootstrap
from audit.statistics.metrics import Confusion, auc, best_f1, confusion, max_f1, roc, tpr_at_fpr

Curves = Mapping[str, Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]
Distributions = Mapping[str, Mapping[str, NDArray[np.float64]]]

OUTPUTS = ("evaluation.csv", "verdicts.csv", "roc.png", "scores.png", "evaluation.json")
"""What an evaluation may write; the last says that the others are of one."""


@dataclass(frozen=True)
class Figure:
    """One score on one type of memorised captions against the clean ones. Intervals are 95 % cluster bootstrap.

    Attributes:
        stage: scan, trajectories or confirm (of the candidates alone). score: its column.
        images: `one` (the first noise), `mean` or `best` of K images. type: the label of the memorised ones, or all.
        memorised, clean: distinct captions. f1_threshold: flag above it.
        tpr_1, tpr_01: largest TPR whose FPR is at most 1 % and 0.1 %.
        gain: AUC minus that of the scan's magnitude on the same captions; gain_not_above: share of resamples <= 0.
    """

    stage: str
    score: str
    images: str
    type: str
    memorised: int
    clean: int
    auc: float
    auc_low: float
    auc_high: float
    f1: float
    f1_low: float
    f1_high: float
    f1_threshold: float
    tpr_1: float
    tpr_1_low: float
    tpr_1_high: float
    tpr_01: float
    tpr_01_low: float
    tpr_01_high: float
    gain: float
    gain_low: float
    gain_high: float
    gain_not_above: float


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        labels: distinct captions by label. figures: a row a score and type. verdicts: labels against verdicts, None
            without a confirm. notes: what was left out, a sentence each. files: what was written. unfinished: what of
            the run is not done; the notes say it too.
    """

    output: str
    labels: dict[str, int]
    figures: list[Figure]
    verdicts: Confusion | None
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """3 when the run is not finished, else 0."""
        return 3 if self.unfinished else 0

    def lines(self) -> list[str]:
        """For a terminal: a row a score, then the verdicts and the notes."""
        head = ("stage", "score", "images", "type", "n", "AUC", "F1", "TPR@1%FPR", "TPR@0.1%FPR", "AUC - magnitude")
        rows = [
            (
                *(each.stage, each.score, each.images, each.type, f"{each.memorised}/{each.clean}"),
                _interval(each.auc, each.auc_low, each.auc_high),
                _interval(each.f1, each.f1_low, each.f1_high),
                _interval(each.tpr_1, each.tpr_1_low, each.tpr_1_high),
                _interval(each.tpr_01, each.tpr_01_low, each.tpr_01_high),
                _interval(each.gain, each.gain_low, each.gain_high, "+.3f") if each.score != BASELINE else "",
            )
            for each in self.figures
        ]
        lines = [*grid(head, rows), ""]
        if self.verdicts:
            body = zip(self.verdicts.labels, self.verdicts.counts.tolist(), strict=True)
            cells = [(label, *map(str, counts)) for label, counts in body]
            lines += ["Verdicts by label:", *grid(["label", *self.verdicts.verdicts], cells), ""]
        return lines + self.notes


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Compare a run's scores and verdicts with labels; writes tables (CSV, JSON) and plots (PNG).

    Duplicates count once: a row of the sample is a distinct caption. Same seed, same figures. Of a run that is not
    finished it measures what is there, and says so.

    Raises:
        AuditError: no run, no or unreadable labels, a class that no caption has, contradicting labels or clusters.
    """
    run = Run.open(config.run)
    unfinished = _unfinished(run)  # before anything is read: what is done meanwhile may be missed
    truth, notes = match_labels(run, config, unfinished)
    types = memorised_types(truth.labels, config, unfinished)
    clean = is_clean(truth.labels, config)
    series = list(find_series(run, truth.row_ids))
    base = next(each for each in series if each.stage == "scan" and each.score == BASELINE)
    output = (config.output or join(config.run, "evaluate")).rstrip("/")
    check_writable(Folder(output))
    figures: list[Figure] = []
    curves: dict[str, dict[str, Any]] = {}
    left_out: dict[tuple[str, str, str], dict[str, None]] = {}
    with Progress(len(series) * len(types), "scores", "evaluate") as progress:
        for each in series:
            values = aligned(each, truth.row_ids)
            for name, wanted in types.items():
                rows = covered(each, truth.row_ids) & (clean | np.isin(truth.labels, wanted))
                is_memorised = ~clean[rows]
                progress.add(1)
                if not is_memorised.any() or is_memorised.all():
                    missing = "clean" if is_memorised.any() else "memorised"
                    left_out.setdefault((each.stage, name, missing), {})[each.score] = None
                    continue
                clusters = None if truth.clusters is None else truth.clusters[rows]
                baseline = aligned(base, truth.row_ids)[rows]
                figures.append(measure(each, name, values[rows], is_memorised, baseline, clusters, config))
                label = each.score if each.images == "one" else f"{each.score} ({each.images})"
                curves.setdefault(f"{each.stage}: {name} against clean", {})[label] = roc(values[rows], is_memorised)
    counts = {str(label): int((truth.labels == label).sum()) for label in sorted(set(truth.labels))}
    notes += [
        f"{stage}, {name}: no {missing} caption has these scores, not evaluated: {', '.join(scores)}."
        for (stage, name, missing), scores in left_out.items()
    ]
    notes += _size_notes(int(clean.sum()))
    notes += [f"Not finished: {line}." for line in unfinished]
    found = Evaluation(output, counts, figures, _verdicts(run, truth), notes, unfinished=unfinished)
    distributions = {
        f"{each.stage} {each.score}": {
            label: aligned(each, truth.row_ids)[truth.labels == label] for label in counts if label
        }
        for each in series
        if each.images in ("one", "mean", SECOND_LOOK)
    }
    return _write(found, config, curves, distributions)


def measure(
    series: Series,
    kind: str,
    values: NDArray[np.float64],
    memorised: NDArray[np.bool_],
    baseline: NDArray[np.float64],
    clusters: Any,
    config: EvaluateConfig,
) -> Figure:
    """Every metric of one score with its interval; arrays [n]."""
    shared: dict[str, Any] = {"num_resamples": config.resamples, "seed": config.seed}

    def interval(statistic: Statistic) -> tuple[float, float]:
        return cluster_bootstrap(statistic, values, memorised, clusters, **shared)

    def tpr(alpha: float) -> tuple[float, float, float]:
        resampled: Statistic = functools.partial(tpr_at_fpr, alpha=alpha)
        return tpr_at_fpr(values, memorised, alpha=alpha), *interval(resampled)

    f1, threshold = best_f1(values, memorised)
    gain = paired_bootstrap(auc, values, baseline, memorised, clusters, **shared)
    return Figure(
        *(series.stage, series.score, series.images, kind, int(memorised.sum()), int((~memorised).sum())),
        *(auc(values, memorised), *interval(auc)),
        *(f1, *interval(max_f1), threshold),
        *tpr(0.01),
        *tpr(0.001),
        *gain,
    )


def _unfinished(run: Run) -> list[str]:
    """What of a run's scores and verdicts is still to come, in words; [] where nothing is."""
    status = run_status(run.url)
    lines = [line for name, line in status.not_begun.items() if name != MITIGATE.name]
    for stage in status.stages:
        if stage.stage == MITIGATE.name:  # nothing of it is measured here
            continue
        if not stage.complete:
            lines.append(f"{stage.stage}: {stage.done:,} of {stage.shards:,} shards are done")
        lines += [f"{stage.stage}: shard {shard} was given up: {error}" for shard, error in stage.errors.items()]
    if Stage.find(run, TRAJECTORIES) is not None and Stage.find(run, CONFIRM) is None:
        lines.append(f"{CONFIRM.name}: not begun yet")
    return lines


def _verdicts(run: Run, truth: Truth) -> Confusion | None:
    stage, table = Stage.find(run, CONFIRM), read_stage(run, "confirm", ["row_id", "verdict"])
    if stage is None or table is None:
        return None
    verdict = dict.fromkeys(stage.items["row_id"].to_pylist(), UNDECIDED)
    verdict.update(zip(table["row_id"].to_pylist(), table["verdict"].to_pylist(), strict=True))
    return confusion(truth.labels.tolist(), [verdict.get(row, NOT_CONFIRMED) for row in truth.row_ids.tolist()])


# --- output -----------------------------------------------------------------------------------------------------


def _size_notes(clean: int) -> list[str]:
    short = [f"{alpha:.1%}" for alpha in (0.01, 0.001) if clean * alpha < 1]
    if not short:
        return []
    return [f"With {clean:,} clean captions no false positive at all is allowed at an FPR of {' and '.join(short)}."]


def _write(found: Evaluation, config: EvaluateConfig, curves: Curves, distributions: Distributions) -> Evaluation:
    folder = Folder(found.output)
    rows = [asdict(figure) for figure in found.figures]
    files = {"evaluation.csv": _csv(list(rows[0]) if rows else [], [list(row.values()) for row in rows])}
    facts: dict[str, Any] = {"config": asdict(config), "labels": found.labels, "notes": found.notes}
    facts |= {"unfinished": found.unfinished, "scores": rows}
    if found.verdicts:
        body = zip(found.verdicts.labels, found.verdicts.counts.tolist(), strict=True)
        files["verdicts.csv"] = _csv(["label", *found.verdicts.verdicts], [[label, *counts] for label, counts in body])
        facts["verdicts"] = {
            label: dict(zip(found.verdicts.verdicts, counts, strict=True))
            for label, counts in zip(found.verdicts.labels, found.verdicts.counts.tolist(), strict=True)
        }
    files["evaluation.json"] = json.dumps(finite(facts), indent=1, allow_nan=False).encode()
    if folder.exists(OUTPUTS[-1]):  # an earlier evaluation's, which may have had more
        for name in OUTPUTS:
            folder.remove(name)
    for name in sorted(files, key=OUTPUTS.index, reverse=True):
        folder.write(name, files[name])
    if curves:  # the tables are safe by now
        files["roc.png"], files["scores.png"] = roc_plot(curves), distribution_plot(distributions)
        folder.write("roc.png", files["roc.png"])
        folder.write("scores.png", files["scores.png"])
    found.files.extend(join(folder.url, name) for name in files)
    return found


def finite(value: Any) -> Any:
    """The same facts with NaN and infinities as null, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([plain_text(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue().encode()


def _interval(value: float, low: float, high: float, form: str = ".3f") -> str:
    if math.isnan(low):
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
