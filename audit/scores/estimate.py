"""`scan --dry-run`: plan in a temporary folder, time one batch, write nothing to the output."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from audit.base.storage import Folder
from audit.base.text import duration, size
from audit.captions import AUTO, MOST_SECONDS, CaptionPlan, is_empty, read_shard, rows_in_time
from audit.run.select import rows_of
from audit.scores.model import load_model
from audit.scores.null_maps import few_lines
from audit.scores.scan import ScanConfig, check_config, fingerprint_of, plan_of
from audit.scores.scorer import open_scorer
from audit.scores.trajectories import open_sampler

MEASURED = 32  # captions of the batch where the size is found by the scan


@dataclass(frozen=True)
class Estimate:
    """What a dry run found; seconds on one worker from one measured batch, bytes of the masks before compression.

    `batch` is how many captions the measured batch had. `shard_seconds` is what the rows of a shard take, `short_shard`
    how many rows would take five minutes where they take longer, else None. `refine_seconds` is what `--refine` adds;
    `evaluations` are those of null maps, scan and second look, `steps` times two for each with `--mask final`.
    """

    rows: int
    unique: int
    empty: int
    shards: int
    rows_per_shard: int
    seconds: float
    captions_per_second: float
    batch: int
    mask_bytes: int
    shard_seconds: float = 0.0
    short_shard: int | None = None
    refine_seconds: float = 0.0
    evaluations: int = 0

    @property
    def exit_code(self) -> int:
        """0, or 3 when no caption has text."""
        return 0 if self.unique else 3

    def lines(self, config: ScanConfig) -> list[str]:
        """For a terminal."""
        rate = f"{self.captions_per_second:.1f} captions/s on one worker, one batch of {self.batch}"
        rate += "; --batch-size auto may find a faster size" if config.batch_size == AUTO else ""
        each = f" ({self.evaluations / self.unique:.2f} a caption: {_looks(config)})" if self.unique else ""
        lines = [
            f"rows             {self.rows:,} ({self.empty:,} empty)",
            f"unique captions  {self.unique:,}",
            f"shards           {self.shards:,} of {self.rows_per_shard:,} rows{self._shard_words()}",
            f"evaluations      {self.evaluations:,}{each}",
            f"estimated time   {duration(self.seconds)} ({rate})",
        ]
        if config.refine:
            lines.append(f"--refine adds    {duration(self.refine_seconds)}")
        stored = f"--store-masks {config.store_masks}, before compression"
        return [*lines, f"masks            {size(self.mask_bytes)} ({stored})", "Nothing was written."]

    def _shard_words(self) -> str:
        if self.short_shard is None:
            return ""
        return (
            f", each some {duration(self.shard_seconds)} on one worker: --rows-per-shard {self.short_shard} keeps it "
            f"under {duration(MOST_SECONDS)}"
        )


def _looks(config: ScanConfig) -> str:
    """What the evaluations are made of, in words."""
    words = f"{config.num_noises} noise{'s' if config.num_noises > 1 else ''}"
    if config.added_noises:
        words += f", {config.added_noises} more for the best {config.second_look:.3g}"
    return f"{words}, and those of the null maps"


def estimate(config: ScanConfig, say: Callable[[str], None]) -> Estimate:
    """What a scan would take. `say` is given the lines of the plan before the model is loaded.

    Raises:
        AuditError: as the scan would.
    """
    folder = check_config(config)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Folder(temporary)
        plan = plan_of(config, staging)
        for line in [*plan.facts.lines(plan.num_rows, plan.num_unique, plan.num_empty), *few_lines(len(plan.sample))]:
            say(line)
        # no search for the fastest with `auto`: it may take long
        batch_size = MEASURED if config.batch_size == AUTO else config.batch_size
        batch = _first_captions(plan, staging, batch_size)
    fingerprint = fingerprint_of(config, folder, plan.files, plan.rows_per_shard)
    model = load_model(folder, config.device, fingerprint.dtype)
    scorer = open_scorer(fingerprint, model, batch_size)
    rate = refine_seconds = 0.0
    if batch and config.refine:
        sampler = open_sampler(fingerprint, model, config.num_noises, batch_size)
        started = time.monotonic()
        sampler(batch[:4])
        each = (time.monotonic() - started) / len(batch[:4])
        refine_seconds = each * rows_of(config.refine, plan.num_unique) * config.num_noises
    if batch:
        scorer(batch[:1], lambda _: None)  # warm up
        started = time.monotonic()
        scorer(batch, lambda _: None)
        rate = len(batch) / (time.monotonic() - started)
    rows_rate = rate * plan.num_rows / max(plan.num_unique, 1)  # of all rows: only different captions take time
    shorter = rows_in_time(rows_rate)
    again = rows_of(config.second_look, plan.num_unique) * config.added_noises
    each_look = 2 * config.steps if fingerprint.mask == "final" else 1 + config.extra_evaluation
    sampled = len(plan.sample) * (config.num_noises + config.added_noises)
    looks = plan.num_unique * config.num_noises + again
    _, height, width = folder.latent_shape()
    stored = {"none": 0, "bits": height * -(-width // 8), "float16": 2 * height * width}[config.store_masks]
    return Estimate(
        rows=plan.num_rows,
        unique=plan.num_unique,
        empty=plan.num_empty,
        shards=len(plan),
        rows_per_shard=plan.rows_per_shard,
        shard_seconds=plan.rows_per_shard / rows_rate if rate else 0.0,
        short_shard=shorter if rate and shorter < plan.rows_per_shard else None,
        seconds=(looks + sampled / each_look) / config.num_noises / rate if rate else 0.0,
        captions_per_second=rate,
        batch=len(batch),
        mask_bytes=2 * plan.num_unique * stored,  # mask and energy_mask
        refine_seconds=refine_seconds,
        evaluations=looks * each_look + sampled,
    )


def _first_captions(plan: CaptionPlan, staging: Folder, count: int) -> list[str]:
    """The first distinct captions, at most so many."""
    captions: list[str] = []
    for shard in range(len(plan)):
        table = read_shard(plan, shard, staging, [])
        texts = table["caption"].to_pylist()
        scored = (plan.duplicates(shard) < 0) & ~is_empty(table["caption"])
        captions += [texts[row] for row in np.flatnonzero(scored)]
        if len(captions) >= count:
            break
    return captions[:count]
