"""`be-audit scan`: first-step scores of every caption, shard by shard, resumable."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.captions import CaptionFile, CaptionPlan, describe_captions, is_empty, plan_captions, read_shard
from audit.errors import AuditError
from audit.options import option
from audit.run import DEFAULT_RUN, Run, check_output
from audit.schema import DEFAULT_SCORE
from audit.scoring import open_scorer
from audit.stopping import Stop
from audit.storage import Folder

if TYPE_CHECKING:
    from pipelines.loading import ModelFolder

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"


@dataclass(frozen=True)
class ScanConfig:
    """What to scan, with what, and how. Every field is a flag of `be-audit scan`."""

    captions: tuple[str, ...] = option((), "Caption files, folders, globs or data sets.", argument=True)
    output: str = option(DEFAULT_RUN, "Run folder (any fsspec URL).", short="-o", envvar="BE_AUDIT_RUN")
    model: str = option(DEFAULT_MODEL, "Hub id or diffusers folder; `testbed` is the embedded model.")
    revision: str | None = option(None, "Revision of a hub model.")
    caption_col: str | None = option(None, "Caption column; found by itself (TEXT, caption, text, prompt, ...).")
    limit: int | None = option(None, "Scan the first N rows only.", min=1)
    mask: str = option(
        "energy",
        "Mask of ld: energy map of the first step, or EOS attention of the first or final (the paper's) step.",
        choices=("energy", "first", "final"),
    )
    mask_token: str = option("eos", "Whose attention --mask first or final is.", choices=("eos", "bos", "padding"))
    mask_layers: tuple[str, ...] = option(
        (), "Cross-attention layers of --mask first or final, comma-separated; default the paper's two."
    )
    refine: float = option(
        0.0, "Then run the full trajectory on this fraction of the rows, the best-scored.", min=0.0, max=1.0
    )
    replace: bool = option(False, "Discard an earlier refinement that was begun differently.")
    refine_by: str = option(
        DEFAULT_SCORE, "Score the fraction is chosen by.", choices=("ld", "ld_energy", "magnitude", "webster")
    )
    num_noises: int = option(1, "Initial noises every caption is scored with.", min=1)
    steps: int = option(50, "Sampling steps.", min=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance scale.")
    seed: int = option(0, "Seed of the noise bank.", min=0, max=2**63 - 1)
    dtype: str = option(
        "auto",
        "auto is float16 on CUDA, else float32; bfloat16 moves scores by several per cent.",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    batch_size: int = option(32, "Latents in one U-Net call; halved when memory runs out.", min=1)
    rows_per_shard: int = option(1024, "Rows of a shard: what a kill can lose.", min=1)
    masks: str = option("bits", "Store the masks of ld.", choices=("none", "bits", "float16"))
    keep_cols: tuple[str, ...] | None = option(
        None, "Input columns to carry through, comma-separated; default url, key and id-like."
    )
    extra_evaluation: bool = option(False, "One more U-Net evaluation a caption, for the anisotropy score.")
    engine: str = option("local", "Where shards run.", choices=("local", "ray"))
    workers: int = option(0, "Worker processes; 0 is one a GPU.", min=0)
    rank: int | None = option(
        None, "This machine's place among --world-size; without both, Slurm's are found by themselves, else 0.", min=0
    )
    world_size: int | None = option(None, "Machines that share the run; default 1.", min=1)
    max_error_rate: float = option(
        0.05, "A shard with a larger share of failed rows (and more than one) is not committed.", min=0.0, max=1.0
    )
    max_shard_retries: int = option(3, "Tries of a shard before it is given up.", min=1)
    dry_run: bool = option(False, "Plan, time one batch, print the estimate, write nothing.")


@dataclass(frozen=True)
class ScanSummary:
    """What a scan did.

    Attributes:
        rows, unique: of the whole run. counts: rows by status (ok, error, empty, duplicate) of committed shards.
        shards, committed_before, committed_now: numbers of shards. quarantined: shards given up.
        seconds: wall time of this call. complete: every shard of the run is committed.
        mine_complete: every shard of this rank is.
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
    refined: int = 0
    refine_pending: bool = False

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed rows or shards, 75 when the refinement still waits for other machines."""
        if self.quarantined or self.counts.get("error") or not self.mine_complete:
            return 3
        return 75 if self.refine_pending else 0


@dataclass(frozen=True)
class Estimate:
    """What a dry run found; seconds on one worker from one measured batch, bytes of the masks before compression.

    `refine_seconds` is what `--refine` adds.
    """

    rows: int
    unique: int
    empty: int
    shards: int
    seconds: float
    captions_per_second: float
    mask_bytes: int
    refine_seconds: float = 0.0


def scan(config: ScanConfig, stop: Stop | None = None) -> ScanSummary:
    """Scan captions into a run folder, or go on with a scan that was begun there.

    Raises:
        AuditError: bad input or another run's folder; nothing was written.
        Drained: `stop` asked to; the run can be gone on with.
        Broken: every worker failed shard after shard; the run can be gone on with.
    """
    started = time.monotonic()
    rank, world = find_rank(config)
    os.environ["BE_AUDIT_RANK"] = str(rank)
    folder = Folder(config.output)
    run, _ = _find_or_plan(config, folder)
    done = run.scan.done()
    mine = range(rank, len(run.plan), world)
    todo = [shard for shard in mine if shard not in done]
    for shard in run.scan.tried() & set(todo):  # whoever types the command again wants the given-up ones tried again
        if len(run.scan.attempts(shard)) >= config.max_shard_retries:
            folder.remove(f"_attempts/scan/{shard:05d}.json")
    folder.sweep()
    from audit.jobs import run_stage

    outcome = run_stage(run, "scan", run.scan, todo, config, stop, _rows_of(run), "captions", done)
    now = run.scan.done()
    counts, quarantined, refined = _sum_counts(now.values()), outcome.quarantined, 0
    complete = len(now) == len(run.plan)
    if config.refine and complete:
        from audit.refine import run_refine

        stage, more = run_refine(run, config, rank, world, stop)
        extra = _sum_counts(stage.ledger.done(stage.shards).values())
        refined, quarantined = extra.get("ok", 0), quarantined + more.quarantined
        counts["error"] = counts.get("error", 0) + extra.get("error", 0)
    return ScanSummary(
        output=config.output,
        rows=run.facts["rows"],
        unique=run.facts["unique"],
        counts=counts,
        shards=len(run.plan),
        committed_before=len(done),
        committed_now=len(outcome.committed),
        quarantined=quarantined,
        seconds=time.monotonic() - started,
        complete=complete,
        mine_complete=set(mine) <= set(now),
        refined=refined,
        refine_pending=bool(config.refine) and not complete,
    )


def estimate(config: ScanConfig) -> Estimate:
    """Plan in a temporary folder, time one batch, write nothing to the output."""
    from pipelines.loading import ModelError, load

    model_folder = _check(config)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Folder(temporary)
        plan = _plan(config, staging)
        fingerprint = fingerprint_of(config, model_folder, plan.files)
        try:
            model = load(model_folder, config.device, fingerprint["dtype"])
        except ModelError as error:
            raise AuditError(str(error)) from error
        scorer = open_scorer(fingerprint, model, config.batch_size)
        captions: list[str] = []
        for shard in range(len(plan)):
            table = read_shard(plan, shard, staging, [])
            of = plan.duplicates(shard)
            texts = table["caption"].to_pylist()
            captions += [texts[i] for i in np.flatnonzero((of < 0) & ~is_empty(table["caption"]))]
            if len(captions) >= config.batch_size:
                break
        batch = captions[: config.batch_size]
        rate = refine_seconds = 0.0
        if batch and config.refine:
            from audit.trajectories import open_sampler

            sampler = open_sampler(fingerprint, model, config.num_noises, config.batch_size)
            few = batch[:4]
            started = time.monotonic()
            sampler(few)
            each = (time.monotonic() - started) / len(few)
            refine_seconds = each * math.ceil(round(config.refine * plan.num_unique, 9)) * config.num_noises
        if batch:
            scorer(batch[:1], lambda _: None)  # warm up
            started = time.monotonic()
            scorer(batch, lambda _: None)
            rate = len(batch) / (time.monotonic() - started)
    _, height, width = model_folder.latent_shape()
    mask_bytes = {"none": 0, "bits": height * -(-width // 8), "float16": 2 * height * width}[config.masks]
    return Estimate(
        rows=plan.num_rows,
        unique=plan.num_unique,
        empty=plan.num_empty,
        shards=len(plan),
        seconds=plan.num_unique / rate if rate else 0.0,
        captions_per_second=rate,
        mask_bytes=plan.num_unique * mask_bytes,
        refine_seconds=refine_seconds,
    )


def find_rank(config: ScanConfig) -> tuple[int, int]:
    """(rank, world size): the flags; without either, Slurm's array or step (said on stderr); else 0 of 1.

    Raises:
        AuditError: a rank that is not below the world size.
    """
    rank, world, source = config.rank or 0, config.world_size or 1, "--rank"
    if config.rank is None and config.world_size is None:
        for of_rank, of_world in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ):
            if of_rank in os.environ and of_world in os.environ:
                first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")) if "ARRAY" in of_rank else 0
                step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")) if "ARRAY" in of_rank else 1
                rank, world, source = (int(os.environ[of_rank]) - first) // step, int(os.environ[of_world]), of_rank
                break
    if not 0 <= rank < world:
        raise AuditError(f"{source} {rank}: must be below --world-size {world}")
    if source != "--rank" and world > 1:
        print(f"rank {rank} of {world} ({source}); --rank 0 --world-size 1 scans it all here", file=sys.stderr)
    return rank, world


def find_model_folder(config: Any) -> ModelFolder:
    """The folder of a configuration's model (fields model, revision, device); ModelError as AuditError."""
    from audit import testbed
    from pipelines.loading import ModelError, find_device, find_model

    try:
        find_device(config.device)
        if config.model == "testbed":
            return find_model(str(testbed.PIPELINE))
        return find_model(config.model, config.revision)
    except ModelError as error:
        raise AuditError(str(error)) from error


def fingerprint_of(config: ScanConfig, model: ModelFolder, files: Sequence[Any]) -> dict[str, Any]:
    """Everything that changes a result, and nothing that does not (design of the run folder: docs/run-folder.md)."""
    from pipelines.formulas import FORMULA_VERSION
    from pipelines.loading import find_device, resolve_dtype

    return {
        "formula_version": FORMULA_VERSION,
        "inputs": [_input_facts(file) for file in files],
        "limit": config.limit,
        "rows_per_shard": config.rows_per_shard,
        "keep_cols": None if config.keep_cols is None else list(config.keep_cols),
        "model": {"weights_sha256": model.weights_sha256(), "revision": model.revision},
        "scheduler": model.scheduler_config(),
        "dtype": resolve_dtype(config.dtype, find_device(config.device)),
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "num_noises": config.num_noises,
        "mask": config.mask,
        "mask_token": config.mask_token,
        "mask_layers": list(config.mask_layers),
        "masks": config.masks,
        "extra_evaluation": config.extra_evaluation,
    }


def _input_facts(file: CaptionFile) -> dict[str, Any]:
    """What identifies an input: not the staged copy, and rows only where they are known without reading it all."""
    facts = file.to_dict()
    if facts.pop("staged") or file.rows < 0:
        del facts["rows"]
    return facts


def _recorded(config: ScanConfig, plan: CaptionPlan) -> dict[str, Any]:
    """The configuration as run.json keeps it: with absolute paths, so that it can be gone on with from elsewhere."""
    model = os.path.abspath(config.model) if os.path.isdir(config.model) else config.model
    return {**asdict(config), "model": model, "captions": [file.path for file in plan.files]}


def _plan(config: ScanConfig, staging: Folder) -> CaptionPlan:
    return plan_captions(
        list(config.captions),
        caption_col=config.caption_col,
        keep_cols=config.keep_cols,
        limit=config.limit,
        rows_per_shard=config.rows_per_shard,
        staging=staging,
    )


def _check(config: ScanConfig) -> ModelFolder:
    """Refuse flags that do not go together or that the model cannot serve, before anything is planned."""
    from pipelines.loading import find_layers

    if config.mask == "final" and config.extra_evaluation:
        raise AuditError("--extra-evaluation: goes with --mask first or energy")
    if config.mask == "energy" and (config.mask_layers or config.mask_token != "eos"):
        flag = "--mask-layers" if config.mask_layers else "--mask-token"
        raise AuditError(f"{flag}: chooses an attention, and --mask energy has none; add --mask first or --mask final")
    model = find_model_folder(config)
    trained = int(model.scheduler_config().get("num_train_timesteps", 1000))
    if config.steps > trained:
        raise AuditError(f"--steps {config.steps}: this model has {trained} timesteps")
    known = find_layers(model) if config.mask_layers else []
    for name in config.mask_layers:
        if name not in known:
            raise AuditError(f"--mask-layers {name}: the U-Net has no such cross-attention; it has {', '.join(known)}")
    return model


def _find_or_plan(config: ScanConfig, folder: Folder) -> tuple[Run, bool]:
    """The run of this configuration: the one in the folder when it is the same, else a new one; and which."""
    existing = Run.find(folder)
    known = existing.plan.files if existing else []
    files = describe_captions(list(config.captions), caption_col=config.caption_col, known=known)
    model = _check(config)
    fingerprint = fingerprint_of(config, model, files)
    if existing is not None:
        existing.check_same(fingerprint)
        return existing, False
    check_output(folder)
    plan = _plan(config, folder)
    fingerprint = fingerprint_of(config, model, plan.files)
    return Run.create(folder, _recorded(config, plan), fingerprint, plan), True


def _rows_of(run: Run) -> dict[int, int]:
    return dict(enumerate(run.plan.shards["row_count"].to_pylist()))


def _sum_counts(commits: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for made in commits:
        for key, value in made.counts.items():
            total[key] = total.get(key, 0) + value
    return total
