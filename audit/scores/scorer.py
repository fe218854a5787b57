"""Captions to score columns, by either scorer; a caption that fails is a row with an error, never a missing row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.engines.failures import together_or_alone
from audit.run.run import Fingerprint

if TYPE_CHECKING:
    from pipelines import DiffusionModel, FirstStepScorer, MaskSource, TrajectorySampler
    from pipelines.batching import BatchSize
    from pipelines.null_maps import NullMaps

Columns = dict[str, NDArray[Any]]
REQUIRED = ("magnitude", "ld", "ld_energy", "excess", "excess_pca")
"""A row in which one of these is not finite was not scored."""


class Scorer(Protocol):
    """N captions to columns of length N; raises on a batch that cannot be scored.

    `expect` may be told before, by any thread, what it will be called with.
    """

    def __call__(self, captions: list[str], on_batch: Callable[[int], None]) -> Columns: ...

    def expect(self, captions: list[str]) -> None: ...


@dataclass
class Scored:
    """Columns of the rows that could be scored.

    Attributes:
        rows: their places among the captions. columns: one entry per place. errors: place -> why, for the others.
    """

    rows: NDArray[np.int64]
    columns: Columns = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def score_captions(scorer: Scorer, captions: list[str], on_batch: Callable[[int], None]) -> Scored:
    """Score captions together; when that fails, one by one, so that a bad one costs itself alone.

    A score that is not finite is an error of its row.
    """
    columns: Columns = {}

    def compute(rows: Sequence[int]) -> list[dict[str, Any]]:
        found = scorer([captions[row] for row in rows], on_batch)
        if len(rows) == len(captions):
            columns.update(found)
        return [{name: values[at] for name, values in found.items()} for at in range(len(rows))]

    rows = together_or_alone(range(len(captions)), compute)
    errors = {place: row for place, row in enumerate(rows) if isinstance(row, str)}
    good = np.array([place for place in range(len(rows)) if place not in errors], np.int64)
    if not columns and len(good):  # one by one
        kept = [row for row in rows if not isinstance(row, str)]
        columns = {name: np.stack([row[name] for row in kept]) for name in kept[0]}
    needed = [name for name in REQUIRED if name in columns]
    finite = np.ones(len(good), bool)
    for name in needed:
        finite &= np.isfinite(columns[name])
    for at in np.flatnonzero(~finite):
        told = ", ".join(f"{name} {columns[name][at]}" for name in needed)
        errors[int(good[at])] = f"scores are not finite: {told}"
    return Scored(good[finite], {name: values[finite] for name, values in columns.items()}, errors)


def mask_source(fingerprint: Fingerprint) -> MaskSource:
    """Where the mask of `ld` comes from."""
    from pipelines import MaskSource

    return MaskSource(fingerprint.mask, fingerprint.mask_token, tuple(fingerprint.mask_layers))


def open_scorer(
    fingerprint: Fingerprint,
    model: DiffusionModel,
    batch_size: BatchSize,
    null_maps: NullMaps | None = None,
    noises: range | None = None,
) -> Scorer:
    """The scorer a run's fingerprint describes.

    Args:
        fingerprint: of a run. model: loaded. batch_size: latents at a time.
        null_maps: of the noises used; without them there is no `excess` nor `excess_pca`.
        noises: of the bank; those of the fingerprint by default.

    Raises:
        AuditError: settings the model cannot serve.
    """
    from pipelines import FirstStepScorer, TrajectorySampler
    from pipelines.batching import half

    source = mask_source(fingerprint)
    noises = noises or range(fingerprint.num_noises)
    shared: dict[str, Any] = {
        "num_noises": noises.stop,
        "first_noise": noises.start,
        "seed": fingerprint.seed,
        "steps": fingerprint.steps,
        "guidance_scale": fingerprint.guidance_scale,
        "null_maps": null_maps,
    }
    try:
        if source.step == "final":
            return FinalMask(TrajectorySampler(model, source, batch_size=half(batch_size), **shared))
        return FirstMask(
            FirstStepScorer(
                model, source, batch_size=batch_size, extra_evaluation=fingerprint.extra_evaluation, **shared
            )
        )
    except ValueError as error:
        raise AuditError(str(error)) from error


@dataclass
class FirstMask:
    """Scores of the first step alone."""

    scorer: FirstStepScorer

    def expect(self, captions: list[str]) -> None:
        self.scorer.expect(captions)

    def __call__(self, captions: list[str], on_batch: Callable[[int], None]) -> Columns:
        found = self.scorer(captions, on_batch)
        columns = {
            **found.scores,
            "ld_std": found.ld_std,
            "mask": found.mask,
            "energy_mask": found.energy_mask,
            "num_tokens": found.num_tokens,
            "truncated": found.truncated,
        }
        return {name: values for name, values in columns.items() if values is not None}


@dataclass
class FinalMask:
    """Scores of whole trajectories."""

    sampler: TrajectorySampler

    def expect(self, captions: list[str]) -> None:
        """A trajectory takes so long that its prompts need not be ready before."""

    def __call__(self, captions: list[str], on_batch: Callable[[int], None]) -> Columns:
        return final_mask_columns(self.sampler, captions, on_batch)


def final_mask_columns(sampler: TrajectorySampler, captions: list[str], on_batch: Callable[[int], None]) -> Columns:
    """The paper's first-step LD (mask of the final step) and every window, means over the K noises."""
    count = len(sampler.noises)
    repeated = [caption for caption in captions for _ in range(count)]
    finished = 0

    def on_trajectories(done: int) -> None:
        nonlocal finished
        before, finished = finished // count, finished + done
        on_batch(finished // count - before)

    found = sampler(repeated, list(range(count)) * len(captions), decode=False, on_batch=on_trajectories)
    singles = {**found.first, **found.windows(), "mask": found.be_mask, "energy_mask": found.energy_mask}
    columns = {
        name: values.reshape(len(captions), count, *values.shape[1:]).mean(1)
        for name, values in singles.items()
        if values is not None
    }
    return {
        **columns,
        "ld": columns["ld_first"],
        "ld_std": found.windows()["ld_first"].reshape(len(captions), count).std(1),
        "num_tokens": found.num_tokens[::count],
        "truncated": found.truncated[::count],
        "refined": np.ones(len(captions), bool),
    }
