"""`be-audit scan`: first-step scores of every caption, shard by shard, resumable."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from audit.base.errors import AuditError, StorageError
from audit.base.options import config_of, option
from audit.base.stopping import Stop
from audit.base.storage import Folder
from audit.captions import AUTO, CaptionFile, CaptionPlan, describe_captions, plan_captions
from audit.engines.keep import keeping
from audit.engines.rank import find_rank
from audit.engines.ray_cluster import one_connection
from audit.run.claim import claimed
from audit.run.run import Fingerprint, Run, check_output
from audit.run.schema import DETECTORS, EXTRA_DETECTORS, MASK_DETECTORS, SCORE_COLUMNS, STEADY_SCORE
from audit.run.select import SCORE_OF_SIZE_HELP, score_of_size
from audit.run.stage import NULL_MAPS, REFINE, SCAN, SECOND_LOOK, SECOND_NULL_MAPS, Stage, run_stage
from audit.scores.config import ScoringConfig
from audit.scores.model import (
    absolute_paths,
    few_steps,
    find_model_folder,
    model_facts,
    naming_the_flag,
    no_mask_reason,
)
from audit.scores.null_maps import few_lines, lost_lines, make_null_maps
from audit.scores.refine import RefineFingerprint, begin_refine, run_refine
from audit.scores.second_look import (
    DEFAULT_SCORE_HELP,
    SECOND_LOOK_NOISES,
    SecondLookFingerprint,
    begin_second_look,
    default_score,
    run_second_look,
)
from audit.scores.self_check import LONG

if TYPE_CHECKING:
    from pipelines.folders import ModelFolder


LATER = {
    SECOND_LOOK: ("second_look", "second_look_noises", "second_look_by"),
    REFINE: ("refine", "refine_by"),
}
"""Flags that a later command may give otherwise, as long as their stage was not begun."""


@dataclass(frozen=True)
class ScanConfig(ScoringConfig):
    """What to scan, with what, and how. Every field is a flag of `be-audit scan`."""

    second_look: float = option(
        0.1, "Then score this fraction of the rows, the best-scored, with more noises; 0 for none.", min=0.0, max=1.0
    )
    second_look_noises: int = option(
        SECOND_LOOK_NOISES, "Noises of the second look, the first ones included.", min=2, max=4096
    )
    second_look_by: str | None = option(
        None, f"Score the second look is chosen by; default {SCORE_OF_SIZE_HELP}.", choices=DETECTORS
    )
    refine: float = option(
        0.0, "Then run the full trajectory on this fraction of the rows, the best-scored.", min=0.0, max=1.0
    )
    refine_by: str | None = option(
        None,
        f"Score the fraction is chosen by; default that of the second look, else {DEFAULT_SCORE_HELP}.",
        choices=DETECTORS,
    )
    replace: bool = option(False, "Discard an earlier second look or refinement that was begun differently.")
    store_masks: str = option("bits", "Store the masks of ld and ld_energy.", choices=("none", "bits", "float16"))
    keep_cols: tuple[str, ...] | None = option(
        None, "Input columns to carry through, comma-separated; default url, key and id-like."
    )
    rank: int | None = option(
        None, "This machine's place among --world-size; without both, Slurm's are found by themselves, else 0.", min=0
    )
    world_size: int | None = option(None, "Machines that share the run; default 1.", min=1)
    self_check: bool = option(
        True,
        "Before more than 10,000 rows with --mask first, compare one batch with the plain formula on every device.",
    )
    dry_run: bool = option(False, "Plan, time one batch, print the estimate, write nothing.")

    @property
    def added_noises(self) -> int:
        """Noises that the second look adds; 0 where there is none."""
        return max(0, self.second_look_noises - self.num_noises) if self.second_look else 0


@dataclass(frozen=True)
class ScanSummary:
    """What a scan did.

    Attributes:
        rows, unique: of the whole run. counts: rows by status (ok, error, empty, duplicate) of committed shards.
        shards, committed_before, committed_now: numbers of shards. quarantined: shards given up.
        seconds: wall time of this call. complete: every shard of the run is committed.
        mine_complete: every shard of this rank is.
        looked: rows that had a second look. look_failed: rows in which it failed.
        refined: trajectories of `--refine` that are committed. refine_pending: they wait for other machines' shards.
    """

    output: str
    rows: int
    unique: int
    counts: dict[str, int]
    shards: int
    committed_before: int
    committed_now: int
    quarantined: list[int]
    seconds: float
    complete: bool
    mine_complete: bool
    looked: int = 0
    look_failed: int = 0
    refined: int = 0
    refine_pending: bool = False

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed rows or shards or no caption at all, 75 when the refinement waits for others."""
        failed = self.quarantined or self.counts.get("error") or self.look_failed
        if not self.unique or failed or not self.mine_complete:
            return 3
        return 75 if self.refine_pending else 0


def _silent(line: str) -> None:
    pass


@one_connection()
@keeping()
def scan(config: ScanConfig, stop: Stop | None = None, say: Callable[[str], None] = _silent) -> ScanSummary:
    """Scan captions into a run folder, or go on with a scan that was begun there.

    `say` is given the lines of the plan before the model is loaded.

    Raises:
        AuditError: bad input or another run's folder; nothing was written.
        Drained: `stop` asked to; the run can be gone on with.
        Broken: every worker failed shard after shard; the run can be gone on with.
    """
    started = time.monotonic()
    rank, world = find_rank(config.rank, config.world_size)
    os.environ["BE_AUDIT_RANK"] = str(rank)
    # 1. the run: begun now, or gone on with
    run, new = _find_or_plan(config, Folder(config.output), stop)
    later = {name: getattr(config, name) for kind in LATER if Stage.find(run, kind) is None for name in LATER[kind]}
    for line in plan_lines(run):
        say(line)
    # 2. what is usual of its captions, before any of them is scored
    for line in lost_lines(make_null_maps(run, NULL_MAPS, range(run.fingerprint.num_noises), config, stop, new)):
        say(line)
    # 3. this machine's shards
    stage = Stage.open(run, SCAN)
    done = stage.done()
    mine = stage.shards[rank::world]
    todo, before, rows_before = done.lacking(mine), len(done), stage.rows_of(done.shards)
    del done  # a million commits are not kept for the length of a scan
    long = stage.rows_of(todo) > LONG
    opener = "audit.scores.scan_shard:open_checked_job" if config.self_check and long else None
    outcome = run_stage(stage, todo, config, stop, opener, rows_before)
    done = stage.done()
    complete = len(done) == len(stage.shards)
    counts, quarantined, refined = done.counts, outcome.quarantined, 0
    # 4. more noises for the best-scored rows
    looks, ready = dict[str, int](), complete
    if config.added_noises and complete and counts.get("ok"):
        noises, by = config.second_look_noises, config.second_look_by or score_of_size(run)
        look = begin_second_look(run, config.second_look, by, noises, config, stop, config.replace)
        quarantined = quarantined + run_second_look(look, config, rank, world, stop).quarantined
        looks, ready = look.done().counts, look.complete
    elif complete:
        _check_no_look(run)
    # 5. trajectories of the best-scored rows
    if config.refine and ready and counts.get("ok"):
        refine = begin_refine(run, config.refine, config.refine_by or default_score(run), config.replace)
        more = run_refine(refine, config, rank, world, stop)
        extra = refine.done().counts
        refined, quarantined = extra.get("ok", 0), quarantined + more.quarantined
        counts["error"] = counts.get("error", 0) + extra.get("error", 0)
    if any(run.facts.config.get(name) != value for name, value in later.items()):
        with contextlib.suppress(StorageError):  # a folder to be read alone
            run.record(**later)
    return ScanSummary(
        output=config.output,
        rows=run.facts.rows,
        unique=run.facts.unique,
        counts=counts,
        shards=len(stage.shards),
        committed_before=before,
        committed_now=len(outcome.committed),
        quarantined=quarantined,
        seconds=time.monotonic() - started,
        complete=complete,
        mine_complete=not done.lacking(mine),
        looked=looks.get("ok", 0),
        look_failed=looks.get("error", 0),
        refined=refined,
        refine_pending=bool(config.refine) and not ready,
    )


def resume(run: Run, stop: Stop | None = None) -> None:
    """Go on with a run's scan, second look and refinement as they were begun (`verify --repair`)."""
    config = _as_begun(run)
    look = Stage.find(run, SECOND_LOOK)
    if look is not None:  # likewise
        asked = look.fingerprint(SecondLookFingerprint)
        config = replace(
            config, second_look=asked.fraction, second_look_by=asked.by, second_look_noises=asked.num_noises
        )
    refine = Stage.find(run, REFINE)
    if refine is not None:  # which may have been asked for by a later command than the one that is recorded
        begun = refine.fingerprint(RefineFingerprint)
        config = replace(config, refine=begun.fraction, refine_by=begun.by)
    scan(config, stop)


def fingerprint_of(
    config: ScanConfig, model: ModelFolder, files: Sequence[CaptionFile], auto_rows: int = 0
) -> Fingerprint:
    """Everything that changes a result, and nothing that does not (docs/run-folder.md).

    `auto_rows`: what --rows-per-shard auto is: the number the run was planned with; 0 before it is planned.
    """
    from pipelines.formulas import FORMULA_VERSION
    from pipelines.loading import find_device, resolve_dtype

    return Fingerprint(
        formula_version=FORMULA_VERSION,
        inputs=[_input_facts(file) for file in files],
        limit=config.limit,
        rows_per_shard=auto_rows if config.rows_per_shard == AUTO else config.rows_per_shard,
        keep_cols=None if config.keep_cols is None else list(config.keep_cols),
        model=model_facts(model),
        scheduler=model.scheduler_config(),
        dtype=resolve_dtype(config.dtype, find_device(config.device)),
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        num_noises=config.num_noises,
        mask="none" if no_mask_reason(model, config.mask_layers) else config.mask,
        mask_token=config.mask_token,
        mask_layers=list(config.mask_layers),
        store_masks=config.store_masks,
        extra_evaluation=config.extra_evaluation,
        unit=model.unit(config.steps),
    )


def check_config(config: ScanConfig) -> ModelFolder:
    """Refuse flags that do not go together or that the model cannot serve, before anything is planned.

    Returns:
        the model's folder.
    Raises:
        AuditError: naming the flag.
    """
    from pipelines.attention import check_token

    if config.mask == "final" and config.extra_evaluation:
        raise AuditError("--extra-evaluation: goes with --mask first")
    picks = [("--refine-by", config.refine_by)] if config.refine else []
    picks += [("--second-look-by", config.second_look_by)] if config.added_noises else []
    for flag, by in picks:
        if by in EXTRA_DETECTORS and not config.extra_evaluation:
            raise AuditError(f"{flag} {by}: needs --extra-evaluation")
    model = find_model_folder(config)
    few = few_steps(model, config.steps)
    known, _ = model.mask_layers() if config.mask_layers else ([], ())
    for name in config.mask_layers:
        if name not in known:
            raise AuditError(f"--mask-layers {name}: the model has no such layer to read; it has {', '.join(known)}")
    if config.mask_layers:
        with naming_the_flag():
            check_token(config.mask_token, model.family.fixed_tokens)
    reason = no_mask_reason(model, config.mask_layers)
    if reason and config.mask != "first":
        raise AuditError(f"--mask {config.mask}: {reason}: leave it out, or name layers with --mask-layers")
    for flag, by in picks:
        if reason and by in MASK_DETECTORS:
            raise AuditError(f"{flag} {by}: {reason}: give {STEADY_SCORE}")
    for note in few + _unlike_its_own(config, model):
        print(note, file=sys.stderr)
    return model


def _unlike_its_own(config: ScanConfig, model: ModelFolder) -> list[str]:
    """Where captions are scored otherwise than the model's own pipeline draws them when it is told nothing."""
    from pipelines.families.defaults import call_default, missing_cleaners, published_pipeline

    pipeline = published_pipeline(str(model.index["_class_name"]), model.family.pipeline_class)
    own, notes = call_default(pipeline, "guidance_scale"), []
    if own != config.guidance_scale == ScanConfig.guidance_scale:
        says = f"--guidance-scale {own:g} is what {pipeline.__name__} takes by itself"
        notes.append(f"{says}: give it for images like its own ({config.guidance_scale:g} now)")
    if call_default(pipeline, "clean_caption") and (missing := missing_cleaners()):
        notes.append(
            f"captions are scored as they are, where {pipeline.__name__} takes URLs, HTML and the like out of them: "
            f"pip install {' '.join(missing)} for prompts like its own"
        )
    return notes


def plan_of(config: ScanConfig, staging: Folder) -> CaptionPlan:
    """The plan of a configuration's captions; inputs without random access are copied into `staging`."""
    return plan_captions(
        list(config.captions),
        caption_col=config.caption_col,
        keep_cols=config.keep_cols,
        limit=config.limit,
        rows_per_shard=config.rows_per_shard,
        staging=staging,
        reserved=SCORE_COLUMNS,
        text_format=config.text_format,
    )


def plan_lines(run: Run) -> list[str]:
    """What a run reads and what was left out, for people."""
    found = run.facts.captions.lines(run.facts.rows, run.facts.unique, run.facts.empty)
    return [*found, *few_lines(len(run.plan.sample))]


def _input_facts(file: CaptionFile) -> dict[str, str | int | None]:
    """What identifies an input: not the staged copy, and rows only where they are known without reading it all."""
    facts = file.to_dict()
    del facts["staged"]
    if file.rows < 0:
        del facts["rows"]
    return facts


def _find_or_plan(config: ScanConfig, folder: Folder, stop: Stop | None) -> tuple[Run, bool]:
    """The run of this configuration, the one in the folder when it is the same, else a new one; whether it is new."""
    existing = Run.find(folder)
    files = describe_captions(list(config.captions), caption_col=config.caption_col, text_format=config.text_format)
    model = check_config(config)
    fingerprint = fingerprint_of(config, model, files)
    if existing is None:
        check_output(folder, [file.path for file in files])
        with claimed(folder, fingerprint, stop) as existing:
            if existing is None:
                return _plan(config, folder, fingerprint, files), True
    if config.rows_per_shard == AUTO:
        fingerprint = replace(fingerprint, rows_per_shard=existing.fingerprint.rows_per_shard)
    existing.check_same(fingerprint)
    return existing, False


def _plan(config: ScanConfig, folder: Folder, fingerprint: Fingerprint, files: list[CaptionFile]) -> Run:
    plan = plan_of(config, folder)
    _check_unchanged(files, plan)
    # with absolute paths, so that it can be gone on with from elsewhere
    recorded = {**asdict(config), **absolute_paths(config), "captions": [file.path for file in plan.files]}
    recorded["rows_per_shard"] = plan.rows_per_shard
    fingerprint = replace(fingerprint, rows_per_shard=plan.rows_per_shard)
    return Run.create(folder, recorded, fingerprint, plan, recorded["model"], config.revision)


def _check_no_look(run: Run) -> None:
    """Raise AuditError where a second look was begun and is not done: a run is not whole without it."""
    look, left = Stage.find(run, SECOND_LOOK), list[str]()
    if look is None and Stage.find(run, SECOND_NULL_MAPS) is not None:
        left = ["not begun yet"]
    if look is not None and (missing := look.missing()):
        left = [f"{len(missing)} of {len(look.shards)} shards have none yet"]
    for line in left:
        raise AuditError(f"{run.url}: a second look was begun, {line}: give the flags it was begun with to go on")


def _check_unchanged(files: list[CaptionFile], plan: CaptionPlan) -> None:
    """Raise AuditError where what was planned is not what was looked at before."""
    planned = {file.path: file for file in plan.files}
    for file in files:
        now = planned.get(file.path)
        if now is None or replace(now, rows=file.rows, staged=None) != file:
            raise AuditError(f"{file.path}: changed while it was planned: give the command again")
    if len(planned) != len(files):
        raise AuditError(f"{plan.files[-1].path}: came while it was planned: give the command again")


def _as_begun(run: Run) -> ScanConfig:
    """The configuration of a run's scan, to go on with it on this machine alone."""
    begun = config_of(ScanConfig, run.facts.config)
    return replace(begun, output=run.url, rank=0, world_size=1, dry_run=False, replace=False)


def check_same(run: Run) -> None:
    """Raise AuditError where inputs or model are not those the run was begun with."""
    config = _as_begun(run)
    files = describe_captions(list(config.captions), caption_col=config.caption_col, text_format=config.text_format)
    run.check_same(fingerprint_of(config, check_config(config), files, run.fingerprint.rows_per_shard))


def restore_plan(run: Run) -> None:
    """Plan a run again from its inputs: what is missing or damaged is written anew, and only if it is the very same.

    Raises:
        AuditError: the inputs, or what comes of them, are not those of the run; nothing was touched.
    """
    check_same(run)
    with tempfile.TemporaryDirectory() as temporary:
        again = Folder(temporary)
        sealed = plan_of(_as_begun(run), again).save(again)
        if sealed != run.facts.sealed:
            raise AuditError(
                f"{run.url}: its plan does not come out the same again (another pyarrow?): scan into a new folder"
            )
        for name, seal in sealed.items():
            if seal.problem(run.folder, name):
                run.folder.put(name, again.path(name))
