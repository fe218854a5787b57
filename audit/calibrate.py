"""`be-audit calibrate`: thresholds for YOUR model, from captions known to be clean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from audit.errors import AuditError
from audit.fingerprint import diff_lines
from audit.intervals import CleanThreshold, sample_size_note, threshold_at_fpr
from audit.options import option
from audit.run import Run
from audit.scan import ScanConfig, scan
from audit.schema import DEFAULT_SCORE, DETECTORS, WINDOWS
from audit.storage import Folder
from audit.tables import read_scores

if TYPE_CHECKING:
    from audit.stopping import Stop

FORMAT = 1
MODEL_FIELDS = (
    *("formula_version", "model", "scheduler", "dtype", "steps", "guidance_scale", "seed", "num_noises"),
    *("mask", "mask_token", "mask_layers"),
)
"""Of a run's fingerprint, what its scores depend on: a threshold holds for no other."""
NO_FLAG = ("refine", "refine_by", "replace", "masks", "keep_cols", "rank", "world_size", "dry_run")
"""Fields of ScanConfig that `be-audit calibrate` has no flag for."""


@dataclass(frozen=True)
class CalibrateConfig(ScanConfig):
    """Clean captions, or a run of them, and the rate; how they are scanned is as in ScanConfig."""

    captions: tuple[str, ...] = option((), "Clean captions, as scan takes them, or the run of a scan.", argument=True)
    output: str = option("thresholds.json", "The thresholds; captions are scanned into OUTPUT.run.", short="-o")
    fpr: float = option(0.01, "Share of clean captions that may be flagged.", min=1e-9, max=1 - 1e-9)
    method: str = option(DEFAULT_SCORE, "Score to say the threshold of; the file has them all.",
                         choices=(*DETECTORS, *WINDOWS))  # fmt: skip


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

    @property
    def exit_code(self) -> int:
        """0, or 3 when captions failed and are missing from the sample."""
        return 3 if self.failed else 0

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"{'score':<18} {'flag above':>12}  {'95 % interval':<26} flagged"]
        for name, found in self.thresholds.items():
            between = f"[{found.low:.6g}, {found.high:.6g}]"
            lines.append(f"{name:<18} {found.threshold:>12.6g}  {between:<26} {found.num_above} of {found.num_rows:,}")
        if self.failed:
            lines.append(f"{self.failed:,} captions failed and were left out: be-audit status {self.run}")
        lines.append(f"{sample_size_note(self.rows, self.fpr)}.")
        at = self.thresholds[self.method].threshold
        return [*lines, f"{self.output}: {self.method} > {at:.6g}; use it with --thresholds {self.output}"]


class Thresholds:
    """A thresholds file that fits a run.

    Attributes:
        path: where it was read from. facts: its content.
    """

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts

    def threshold(self, score: str) -> float:
        """Flag a caption when its `score` is above this.

        Raises:
            AuditError: the file has no threshold for this score.
        """
        known = self.facts["thresholds"]
        if score not in known:
            raise AuditError(
                f"--thresholds {self.path}: none for {score}; it has {', '.join(known)}: pass another --by"
            )
        return float(known[score]["threshold"])


def calibrate(config: CalibrateConfig, stop: Stop | None = None) -> Calibration:
    """Thresholds at a false-positive rate from clean captions, written as JSON.

    Every distinct caption counts once. A threshold is the lowest that flags at most a share `fpr` of them; its
    interval is that of the true quantile (`audit.intervals.threshold_at_fpr`).

    Raises:
        AuditError: no captions, a run that is not complete, no scores, or an output that is something else.
        Drained: `stop` asked to; the scan in OUTPUT.run can be gone on with.
    """
    _check_output(config.output)
    run = _find_run(config) or _scan(config, stop)
    left = len(run.plan) - len(run.scan.done())
    if left:
        raise AuditError(f"{run.url}: {left} of {len(run.plan)} shards are not scanned: go on with `be-audit scan`")
    scores = [*DETECTORS, *WINDOWS]
    table = read_scores(run, ["status", "duplicate_of", "mask_source", *scores])
    table = table.filter(pc.is_null(table["duplicate_of"]))
    clean = table.filter(pc.equal(table["status"], "ok"))
    found = {
        name: threshold_at_fpr(_numbers(clean[name]), config.fpr)
        for name in scores
        if clean.num_rows
        and not clean[name].null_count  # a window that only refined rows have says nothing of the rest
    }
    if config.method not in found:
        raise AuditError(f"--method {config.method}: the run has no such score of all rows; it has {', '.join(found)}")
    facts = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": _model_facts(run),
        "mask_source": clean["mask_source"][0].as_py(),
        "steps": run.fingerprint["steps"],
        "method": config.method,
        "fpr": config.fpr,
        "rows": clean.num_rows,
        "note": sample_size_note(clean.num_rows, config.fpr),
        "thresholds": {name: _threshold_facts(each, config.fpr) for name, each in found.items()},
    }
    with fsspec.open(config.output, "wb") as file:
        file.write(json.dumps(facts, indent=1, allow_nan=False).encode())
    failed = pc.sum(pc.equal(table["status"], "error")).as_py() or 0
    return Calibration(config.output, run.url, config.fpr, config.method, clean.num_rows, failed, found)


def load_thresholds(path: str, run: Run) -> Thresholds:
    """A thresholds file for a run.

    Raises:
        AuditError: no such file, no thresholds file, or one made for another model, mask or sampler: with one line a
            field that differs.
    """
    facts = _read(path)
    lines = diff_lines(facts["model"], _model_facts(run))
    if lines:
        raise AuditError(
            f"--thresholds {path}: made for other scores than those of {run.url}. What differs (file -> run):\n  "
            + "\n  ".join(lines[:40])
            + "\nCalibrate again with the flags the run was scanned with."
        )
    return Thresholds(path, facts)


def _model_facts(run: Run) -> dict[str, Any]:
    """What the scores of a run depend on; the revision only names the weights, whose hash is there."""
    facts = {name: run.fingerprint.get(name) for name in MODEL_FIELDS}
    return {**facts, "model": {"weights_sha256": run.fingerprint["model"]["weights_sha256"]}}


def _threshold_facts(found: CleanThreshold, fpr: float) -> dict[str, Any]:
    bound = lambda value: None if value in (float("inf"), float("-inf")) else value  # noqa: E731
    return {
        "threshold": found.threshold,
        "fpr": fpr,
        "low": bound(found.low),
        "high": bound(found.high),
        "rows": found.num_rows,
        "above": found.num_above,
    }


def _find_run(config: CalibrateConfig) -> Run | None:
    """The run that was given instead of captions. Flags of a scan that contradict it are refused, not ignored."""
    if not config.captions:
        raise AuditError("no captions given: pass captions known to be clean, or the run of a scan of them")
    run = Run.find(Folder(config.captions[0])) if len(config.captions) == 1 else None
    if run is None:
        return None
    for place in dataclasses.fields(ScanConfig):
        given, of_run = getattr(config, place.name), run.config.get(place.name)
        of_run = tuple(of_run) if isinstance(of_run, list) else of_run
        if place.name in MODEL_FIELDS and given != place.default and given != of_run and place.name != "dtype":
            flag = place.name.replace("_", "-")
            raise AuditError(f"--{flag} {given}: {run.url} was scanned with {of_run}: leave the flag out")
    return run


def _scan(config: CalibrateConfig, stop: Stop | None) -> Run:
    values = {place.name: getattr(config, place.name) for place in dataclasses.fields(ScanConfig)}
    if config.method in ("cosine_low", "anisotropy") and not config.extra_evaluation:
        raise AuditError(f"--method {config.method}: needs --extra-evaluation")
    if config.method in WINDOWS and config.mask != "final":
        raise AuditError(f"--method {config.method}: needs --mask final")
    output = f"{config.output}.run"
    whole = {"output": output, "masks": "none", "keep_cols": (), "rank": 0, "world_size": 1}
    done = scan(ScanConfig(**{**values, **whole}), stop)
    if not done.complete:
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


def _read(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(path, "rb") as file:
            facts = json.loads(file.read())
    except FileNotFoundError as error:
        raise AuditError(f"--thresholds {path}: no such file: make it with `be-audit calibrate CAPTIONS`") from error
    except (OSError, ValueError) as error:
        raise AuditError(f"--thresholds {path}: cannot be read as JSON") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not {"model", "thresholds"} <= facts.keys():
        raise AuditError(f"--thresholds {path}: no file of `be-audit calibrate`")
    return facts


def _numbers(column: pa.ChunkedArray) -> Sequence[float]:
    return column.cast(pa.float64()).to_numpy()
