"""`be-audit calibrate`: thresholds for YOUR model, from captions known to be clean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.errors import AuditError, Broken
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import diff_lines
from audit.base.options import option
from audit.base.stopping import Stop
from audit.base.storage import Folder
from audit.base.text import grid
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.schema import EXTRA_DETECTORS, RUN_DETECTORS, SCORES, STEADY_SCORE, WINDOWS
from audit.run.stage import SCAN, SECOND_LOOK, SECOND_NULL_MAPS, Stage
from audit.run.status import not_begun
from audit.scores.config import ModelFlags, ScoreFlags, ScoringConfig
from audit.scores.model import absolute_paths
from audit.scores.null_maps import sample_of
from audit.scores.scan import ScanConfig, scan
from audit.scores.second_look import SECOND_LOOK_NOISES, SecondLookFingerprint, looks_noises
from audit.statistics.thresholds import CleanThreshold, sample_size_note, threshold_at_fpr

FORMAT = 1
WHERE_IT_RUNS = {"device", "batch_size", "rows_per_shard", "allow_pickle"}
"""Flags of a scan that no score depends on."""
MODEL_FIELDS = (
    *("formula_version", "model", "unit", "scheduler", "dtype", "steps", "guidance_scale", "seed", "num_noises"),
    *("mask", "mask_token", "mask_layers"),
)
"""Of a run's fingerprint, what its scores depend on: a threshold holds for no other."""


@dataclass(frozen=True)
class CalibrateConfig(ScoringConfig):
    """Clean captions, or a run of them, and the rate; how they are scanned is as in ScanConfig."""

    captions: tuple[str, ...] = option((), "Clean captions, as scan takes them, or the run of a scan.", argument=True)
    output: str = option("thresholds.json", "The thresholds; captions are scanned into OUTPUT.run.", short="-o")
    fpr: float = option(0.01, "Share of clean captions that may be flagged.", min=1e-9, max=1 - 1e-9)
    num_noises: int = option(
        SECOND_LOOK_NOISES,
        "Initial noises of a score, as many as the scan's second look has; thresholds of one noise are written beside.",
        min=1,
        max=4096,
    )
    method: str = option(STEADY_SCORE, "Score to say the threshold of; the file has them all.", choices=SCORES)


@dataclass(frozen=True)
class ScoreThreshold:
    """Threshold of one score: flag above it. low, high: 95 % interval of the true quantile, null where unbounded.

    rows: clean captions. above: how many of them are flagged.
    """

    threshold: float
    fpr: float
    low: float | None
    high: float | None
    rows: int
    above: int


@dataclass(frozen=True)
class ThresholdsFile:
    """What `be-audit calibrate` writes. model: what the scores depend on. method: the score that was asked for.

    first: thresholds of the scores over the first `first_noises` noises alone, where `thresholds` has more of them.
    null_maps: digest of the captions that `excess` was measured against: its threshold holds for no others.
    """

    format: int
    created: str
    model: dict[str, Any]
    mask_source: str
    steps: int
    method: str
    fpr: float
    rows: int
    note: str
    thresholds: dict[str, ScoreThreshold]
    null_maps: str | None = None
    first: dict[str, ScoreThreshold] = field(default_factory=dict)
    first_noises: int = 0

    def of(self, num_noises: int) -> dict[str, ScoreThreshold]:
        """Of scores that are means over so many noises; empty where the file has none."""
        if num_noises == self.model.get("num_noises"):
            return self.thresholds
        return self.first if num_noises == self.first_noises else {}


@dataclass(frozen=True)
class Calibration:
    """What a calibration found: a threshold a score, and the distinct clean captions they rest on."""

    output: str
    run: str
    fpr: float
    method: str
    rows: int
    failed: int
    thresholds: dict[str, CleanThreshold]
    num_noises: int = 1

    @property
    def exit_code(self) -> int:
        """0, or 3 when captions failed and are missing from the sample."""
        return 3 if self.failed else 0

    def lines(self) -> list[str]:
        """For a terminal."""
        rows = [
            [
                name,
                f"{found.threshold:.6g}",
                f"[{found.low:.6g}, {found.high:.6g}]",
                f"{found.num_above} of {found.num_rows:,}",
            ]
            for name, found in self.thresholds.items()
        ]
        lines = grid(["score", "flag above", "95 % interval", "flagged"], rows, [False, True, False, False])
        if self.failed:
            lines.append(f"{self.failed:,} captions failed and were left out: be-audit status {self.run}")
        lines.append(f"{sample_size_note(self.rows, self.fpr)}.")
        at = self.thresholds[self.method].threshold
        lines.append(f"Scores over {self.num_noises} noise{'s' if self.num_noises > 1 else ''} a caption.")
        return [*lines, f"{self.output}: {self.method} > {at:.6g}; use it with --thresholds {self.output}"]


class Thresholds:
    """A thresholds file that fits a run.

    Attributes:
        path: where it was read from. facts: its content. known: thresholds by score.
        num_noises: noises that the scores of a row must be means over for it to be flagged; None where all rows' are.
        null_maps: of the run.
    """

    def __init__(
        self,
        path: str,
        facts: ThresholdsFile,
        known: dict[str, ScoreThreshold],
        num_noises: int | None,
        null_maps: str | None,
    ) -> None:
        self.path, self.facts, self.known = path, facts, known
        self.num_noises, self.null_maps = num_noises, null_maps

    def threshold(self, score: str) -> float:
        """Flag a caption when its `score` is above this.

        Raises:
            AuditError: the file has no threshold for this score, or one under other null maps.
        """
        if score not in self.known:
            raise AuditError(
                f"--thresholds {self.path}: none for {score}; it has {', '.join(self.known)}: pass another --by"
            )
        if score in RUN_DETECTORS and self.facts.null_maps != self.null_maps:
            raise AuditError(
                f"--thresholds {self.path}: {score} is measured against a run's own captions, and these are another "
                "run's: pass another --by, or calibrate the run itself (one scanned with --second-look 1 or 0)"
            )
        found = self.known[score].threshold
        if not np.isfinite(found):
            raise AuditError(f"--thresholds {self.path}: {score}: {found} is no threshold: calibrate again")
        return found


def calibrate(
    config: CalibrateConfig, stop: Stop | None = None, say: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Thresholds at a false-positive rate from clean captions, written as JSON.

    Every distinct caption counts once. A threshold is the lowest that flags at most a share `fpr` of them; its
    interval is that of the true quantile (`audit.statistics.thresholds.threshold_at_fpr`).

    Raises:
        AuditError: no captions, a run that is not complete, no scores, or an output that is something else.
        Drained: `stop` asked to; the scan in OUTPUT.run can be gone on with.
    """
    _check_output(config.output)
    run = _find_run(config) or _scan(config, stop, say)
    stage = Stage.open(run, SCAN)
    left = stage.missing()
    if left:
        raise AuditError(
            f"{run.url}: {len(left)} of {len(stage.shards)} shards are not scanned: go on with `be-audit scan`"
        )
    amiss = not_begun(run)
    for line in (amiss[kind.name] for kind in (SECOND_NULL_MAPS, SECOND_LOOK) if kind.name in amiss):
        raise AuditError(f"{run.url}: {line}: go on with `be-audit scan`")
    first_noises, looks = run.fingerprint.num_noises, looks_noises(run)
    clean, failed = _clean(run, looks or first_noises)
    found, first = _thresholds(clean, config.fpr), dict[str, CleanThreshold]()
    if looks is not None:
        first = _thresholds(_clean(run, first_noises)[0], config.fpr)
    if config.method not in found:
        raise AuditError(f"--method {config.method}: the run has no such score of all rows; it has {', '.join(found)}")
    facts = ThresholdsFile(
        format=FORMAT,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model={**_model_facts(run), "num_noises": looks or first_noises},
        mask_source=clean["mask_source"][0].as_py(),
        steps=run.fingerprint.steps,
        method=config.method,
        fpr=config.fpr,
        rows=clean.num_rows,
        note=sample_size_note(clean.num_rows, config.fpr),
        thresholds={name: _score_threshold(each, config.fpr) for name, each in found.items()},
        null_maps=_null_maps(run),
        first={name: _score_threshold(each, config.fpr) for name, each in first.items()},
        first_noises=first_noises if first else 0,
    )
    with fsspec.open(config.output, "wb") as file:
        file.write(to_json(facts))
    return Calibration(
        config.output, run.url, config.fpr, config.method, clean.num_rows, failed, found, looks or first_noises
    )


def _clean(run: Run, num_noises: int) -> tuple[pa.Table, int]:
    """Scores of the distinct captions, means over so many noises; and how many have none.

    Raises:
        AuditError: a second look had a part of them alone.
    """
    first = num_noises == run.fingerprint.num_noises
    columns = ["status", "duplicate_of", "mask_source", "num_noises", *SCORES]
    table = read_scores(run, columns, first_look=first, confirmed=False)
    table = table.filter(pc.is_null(table["duplicate_of"]))
    clean = table.filter(pc.equal(table["status"], "ok"))
    failed = pc.sum(pc.equal(table["status"], "error")).as_py() or 0
    if first:
        return clean, failed
    stage = Stage.open(run, SECOND_LOOK)
    if stage.fingerprint(SecondLookFingerprint).fraction < 1 or not stage.complete:
        raise AuditError(
            f"{run.url}: not every row had the second look, so their scores are over different numbers of noises: scan "
            "the clean captions with --second-look 1, or give them to calibrate itself"
        )
    whole = clean.filter(pc.equal(clean["num_noises"], num_noises))
    return whole, failed + clean.num_rows - whole.num_rows


def _thresholds(clean: pa.Table, fpr: float) -> dict[str, CleanThreshold]:
    """Of every score that all rows have: a window that only refined rows have says nothing of the rest."""
    kept = [name for name in SCORES if clean.num_rows and not clean[name].null_count]
    return {name: threshold_at_fpr(_numbers(clean[name]), fpr) for name in kept}


def load_thresholds(path: str, run: Run, num_noises: int | None = None) -> Thresholds:
    """A thresholds file for a run.

    Args:
        num_noises: that the scores to be compared are means over; as many as the run's last look by default.

    Raises:
        AuditError: no such file, no thresholds file, or one made for another model, mask or sampler, or another number
            of noises: with one line a field that differs.
    """
    facts, looks = _read(path), looks_noises(run)
    wanted = num_noises or looks or run.fingerprint.num_noises
    known = facts.of(wanted)
    expected = {**_model_facts(run), "num_noises": wanted}
    lines = diff_lines({**facts.model, "num_noises": wanted} if known else facts.model, expected)
    if lines:
        raise AuditError(
            f"--thresholds {path}: made for other scores than those of {run.url}. What differs (file -> run):\n  "
            + "\n  ".join(lines[:40])
            + f"\nCalibrate again with the flags the run was scanned with, and --num-noises {wanted}."
        )
    return Thresholds(path, facts, known, looks if wanted == looks else None, _null_maps(run))


def _null_maps(run: Run) -> str | None:
    sample = sample_of(run)
    return None if sample is None else sample.captions


def _model_facts(run: Run) -> dict[str, Any]:
    """What the scores of a run depend on; the revision only names the weights, whose hash is there."""
    fingerprint = dataclasses.asdict(run.fingerprint)
    facts = {name: fingerprint[name] for name in MODEL_FIELDS}
    return {**facts, "model": {name: value for name, value in fingerprint["model"].items() if name != "revision"}}


def _score_threshold(found: CleanThreshold, fpr: float) -> ScoreThreshold:
    low, high = (value if np.isfinite(value) else None for value in (found.low, found.high))
    return ScoreThreshold(found.threshold, fpr, low, high, found.num_rows, found.num_above)


def _find_run(config: CalibrateConfig) -> Run | None:
    """The run that was given instead of captions. Flags of a scan that contradict it are refused, not ignored."""
    if not config.captions:
        raise AuditError("no captions given: pass captions known to be clean, or the run of a scan of them")
    run = Run.find(Folder(config.captions[0])) if len(config.captions) == 1 else None
    if run is None:
        return None
    typed = {**vars(config), **absolute_paths(config)}  # as a run keeps them
    of_scan = {place.name for flags in (ScoreFlags, ModelFlags) for place in dataclasses.fields(flags)}
    for place in dataclasses.fields(config):
        given, of_run = typed[place.name], run.facts.config.get(place.name)
        of_run = run.fingerprint.dtype if place.name == "dtype" else of_run
        of_run = looks_noises(run) or of_run if place.name == "num_noises" else of_run
        of_run = tuple(of_run) if isinstance(of_run, list) else of_run
        if place.name in of_scan - WHERE_IT_RUNS and getattr(config, place.name) != place.default and given != of_run:
            flag = place.name.replace("_", "-")
            raise AuditError(
                f"--{flag} {getattr(config, place.name)}: {run.url} was scanned with {of_run}: leave the flag out"
            )
    return run


def _scan(config: CalibrateConfig, stop: Stop | None, say: Callable[[str], None]) -> Run:
    if config.method in EXTRA_DETECTORS and not config.extra_evaluation:
        raise AuditError(f"--method {config.method}: needs --extra-evaluation")
    if config.method in WINDOWS and config.mask != "final":
        raise AuditError(f"--method {config.method}: needs --mask final")
    shared = {place.name: getattr(config, place.name) for place in dataclasses.fields(ScoringConfig)}
    output = f"{config.output}.run"
    looks: dict[str, Any] = {"num_noises": 1, "second_look": 1.0 if config.num_noises > 1 else 0.0}
    looks["second_look_noises"] = max(2, config.num_noises)
    looks["second_look_by"] = STEADY_SCORE  # every row is looked at again, whatever it is by
    alone = {"output": output, **looks, "store_masks": "none", "keep_cols": (), "rank": 0, "world_size": 1}
    begun = Run.find(Folder(output))
    if begun is not None and looks_noises(begun) not in (None, config.num_noises):
        raise AuditError(
            f"--num-noises {config.num_noises}: {output} has scores of {looks_noises(begun)} noises: give another -o"
        )
    done = scan(ScanConfig(**{**shared, **alone}), stop, say)
    if not done.unique:
        raise Broken(f"{output}: all {done.rows:,} captions are empty: nothing to calibrate on")
    if not done.complete or done.quarantined:
        raise AuditError(f"{output}: {len(done.quarantined)} shards were given up: be-audit status {output}")
    return Run.open(output)


def _check_output(path: str) -> None:
    """Refuse to write over something that is no thresholds file."""
    fs, name = fsspec.core.url_to_fs(path)
    if fs.isdir(name):
        raise AuditError(f"-o {path}: is a folder; give a file")
    if fs.exists(name):
        try:
            _read(path)
        except AuditError as error:
            raise AuditError(f"-o {path}: there is another kind of file: give a new name") from error


def _read(path: str) -> ThresholdsFile:
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise AuditError(f"--thresholds {path}: no such file: make it with `be-audit calibrate CAPTIONS`") from error
    except OSError as error:
        raise AuditError(f"--thresholds {path}: cannot be read: {error.strerror or error}") from error
    try:
        facts = read_facts(ThresholdsFile, data, path)
    except AuditError as error:
        raise AuditError(f"--thresholds {path}: no file of `be-audit calibrate`") from error
    if facts.format != FORMAT:
        raise AuditError(f"--thresholds {path}: format {facts.format}, this version reads {FORMAT}: calibrate again")
    return facts


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
