"""Before a long scan: one batch on the user's own model and device against the plain formulas.

The plain side makes two separate calls of the denoiser a prompt, one latent at a time, through the model's own
attention processors, with nothing cached or captured, and float8 layers multiplied in float32; `magnitude` is the norm
of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from audit.base.errors import AuditError
from audit.run.run import Run

if TYPE_CHECKING:
    from audit.scores.scorer import Scorer
    from pipelines import DiffusionModel

LONG = 10_000  # rows above which a scan is long enough for it
CAPTIONS = ("a photo of a cat", "an old map of the city of Paris", "blue")
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1, "float8": 1e-1}
"""Largest relative difference of a magnitude: rounding of one batch against single latents in the dtype."""


def check_scorer(run: Run, model: DiffusionModel, scorer: Scorer) -> None:
    """Compare the scorer with the plain formula.

    Raises:
        AuditError: they differ by more than rounding does, with the figures.
    """
    fast = scorer(list(CAPTIONS), lambda _: None)["magnitude"]
    plain = plain_magnitudes(run, model, CAPTIONS)
    error = float(np.max(np.abs(fast - plain) / np.maximum(np.abs(plain), 1e-6)))
    allowed = TOLERANCE[run.fingerprint.dtype]
    if not error <= allowed:
        told = ", ".join(f"{one:.6g} for {other:.6g}" for one, other in zip(fast, plain, strict=True))
        raise AuditError(
            f"--self-check: magnitudes of {len(CAPTIONS)} captions on {model.device} in {run.fingerprint.dtype} are "
            f"off by {error:.2g} where {allowed:g} is allowed ({told}): try --dtype float32 or --device cpu; "
            "--no-self-check scans all the same"
        )


def plain_magnitudes(run: Run, model: DiffusionModel, captions: Sequence[str]) -> np.ndarray:
    """||eps(x_T, e_p) - eps(x_T, e_0)||_2 of each caption, mean over the noises of the run, float32 [n]."""
    import torch

    from pipelines.compiled import uncompiled
    from pipelines.float8 import plain_products

    made = run.fingerprint
    level, unit = model.levels(made.steps)[0], model.unit(made.steps)
    found = np.zeros(len(captions), np.float32)
    with torch.no_grad(), plain_products(model.denoiser), uncompiled(model.denoiser):
        noises = model.noise_bank(made.num_noises, made.seed).to(model.device, model.dtype)
        empty = model.encode_empty()
        for at, caption in enumerate(captions):
            prompt = model.encode([caption])
            norms = []
            for noise in noises.split(1):
                one, other = (model.predict(noise, level, each, made.guidance_scale) for each in (prompt, empty))
                norms.append(float(model.difference(one, other, level, unit).float().norm()))
            found[at] = np.mean(norms)
    return found
