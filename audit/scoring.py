"""Captions to score columns, by either scorer; a caption that fails is a row with an error, never a missing row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from audit.errors import AuditError, Drained

Columns = dict[str, NDArray[Any]]


class Scorer(Protocol):
    """N captions to columns of length N; raises on a batch that cannot be scored."""

    def __call__(self, captions: list[str], on_batch: Callable[[int], None]) -> Columns: ...


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
    errors: dict[int, str] = {}
    parts: list[tuple[int, Columns]] = []
    if captions:
        try:
            parts = [(0, scorer(captions, on_batch))]
        except (AuditError, Drained):
            raise
        except Exception:  # which caption it was shows below
            for row, caption in enumerate(captions):
                try:
                    parts.append((row, scorer([caption], on_batch)))
                except (AuditError, Drained):
                    raise
                except Exception as error:
                    errors[row] = f"{type(error).__name__}: {error}"[:500]
    rows = np.concatenate([start + np.arange(len(found["ld"])) for start, found in parts] or [np.zeros(0, int)])
    columns = {name: np.concatenate([found[name] for _, found in parts]) for name in (parts[0][1] if parts else {})}
    if parts:
        finite = np.isfinite(columns["ld"]) & np.isfinite(columns["magnitude"])
        for place in np.flatnonzero(~finite):
            errors[int(rows[place])] = (
                f"scores are not finite: magnitude {columns['magnitude'][place]}, ld {columns['ld'][place]}"
            )
        rows, columns = rows[finite], {name: values[finite] for name, values in columns.items()}
    return Scored(rows.astype(np.int64), columns, errors)


def open_scorer(fingerprint: dict[str, Any], model: Any, batch_size: int) -> Scorer:
    """The scorer a run's fingerprint describes.

    Args:
        fingerprint: of a run. model: a loaded DiffusionModel. batch_size: latents at a time.
    """
    from pipelines import FirstStepScorer, MaskSource, TrajectorySampler

    source = MaskSource(fingerprint["mask"], fingerprint["mask_token"], tuple(fingerprint["mask_layers"]))
    shared: dict[str, Any] = {
        "num_noises": fingerprint["num_noises"],
        "seed": fingerprint["seed"],
        "steps": fingerprint["steps"],
        "guidance_scale": fingerprint["guidance_scale"],
    }
    try:
        if source.step == "final":
            sampler = TrajectorySampler(model, source, batch_size=max(1, batch_size // 2), **shared)
            return lambda captions, on_batch: final_mask_columns(sampler, captions, on_batch)
        first = FirstStepScorer(
            model, source, batch_size=batch_size, extra_evaluation=fingerprint["extra_evaluation"], **shared
        )
    except ValueError as error:
        raise AuditError(str(error)) from error

    def score(captions: list[str], on_batch: Callable[[int], None]) -> Columns:
        found = vars(first(captions, on_batch))
        return {name: values for name, values in found.items() if values is not None and name != "energy"}

    return score


def final_mask_columns(sampler: Any, captions: list[str], on_batch: Callable[[int], None]) -> Columns:
    """The paper's first-step LD (mask of the final step) and every window, means over the K noises."""
    count = len(sampler.noises)
    repeated = [caption for caption in captions for _ in range(count)]
    finished = 0

    def on_trajectories(done: int) -> None:
        nonlocal finished
        before, finished = finished // count, finished + done
        on_batch(finished // count - before)

    found = sampler(repeated, list(range(count)) * len(captions), decode=False, on_batch=on_trajectories)
    singles = {**found.windows(), "mask": found.be_mask}
    singles |= {name: getattr(found, name) for name in ("ld_energy", "webster", "attention_entropy", "cosine")}
    columns = {
        name: values.reshape(len(captions), count, *values.shape[1:]).mean(1) for name, values in singles.items()
    }
    encoded = sampler.model.tokens(captions)
    return {
        **columns,
        "ld": columns["ld_first"],
        "ld_std": found.ld_t[:, 0].reshape(len(captions), count).std(1),
        "num_tokens": encoded.num_tokens.numpy(),
        "truncated": encoded.truncated.numpy(),
        "refined": np.ones(len(captions), bool),
    }
