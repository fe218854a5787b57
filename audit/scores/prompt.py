"""`be-audit score`: one prompt, every score printed, its masks drawn."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audit.base.errors import AuditError
from audit.base.options import option
from audit.scores.config import DEVICE_HELP, DTYPES, ModelFlags
from audit.scores.model import few_steps, find_model_folder, load_model, naming_the_flag
from pipelines.errors import NotFinite

STRIP = 10  # steps shown in the strip
OVERFLOW = "give a smaller --guidance-scale, or --dtype float32"


@dataclass(frozen=True)
class ScoreConfig(ModelFlags):
    """One prompt and how to score it. Every field is a flag of `be-audit score`."""

    prompt: str = option("", "The prompt.")
    output: str = option("be-audit-score.png", "Picture of mask and maps.", short="-o")
    trajectory: bool = option(False, "Also sample the whole trajectory: image, BE mask, every window, masks by step.")
    mask_token: str = option("eos", "Whose attention is the mask.", choices=("eos", "bos", "padding"))
    mask_layers: tuple[str, ...] = option((), "Attention layers of the mask; default the paper's two.")
    num_noises: int = option(1, "Initial noises the prompt is scored with.", min=1)
    steps: int = option(50, "Sampling steps.", min=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance scale.")
    seed: int = option(0, "Seed of the noise bank.", min=0, max=2**63 - 1)
    dtype: str = option("auto", "auto is float16 on CUDA, else float32.", choices=DTYPES)
    device: str = option("auto", DEVICE_HELP)


def score(config: ScoreConfig) -> dict[str, float]:
    """Score one prompt and draw what the scores rest on.

    Returns:
        every score by name; windows under the BE mask too with `trajectory`.
    Raises:
        AuditError: a prompt that is empty or no text, a model that cannot be loaded, scores or pictures that are not
            finite, a picture that cannot be written.
    """
    import torch

    from pipelines import FirstStepScorer, MaskSource, Trajectories, TrajectorySampler, formulas

    check_prompt(config.prompt, "score")
    check_picture(config.output)
    shared: dict[str, Any] = {
        "num_noises": config.num_noises,
        "seed": config.seed,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
    }
    source = MaskSource("first", config.mask_token, config.mask_layers)
    folder = find_model_folder(config)
    for note in few_steps(folder, config.steps):
        print(note, file=sys.stderr)
    model = load_model(folder, config.device, config.dtype)
    try:
        with naming_the_flag():
            scorer = FirstStepScorer(model, source, extra_evaluation=True, **shared)
            sampler = TrajectorySampler(model, source, **shared) if config.trajectory else None
    except ValueError as error:
        raise AuditError(f"--mask-layers: {error}") from error
    found = scorer([config.prompt])
    scores = {name: float(values[0]) for name, values in found.scores.items()}
    panels = {"energy map,\nfirst step": formulas.energy_map(scorer.differences([config.prompt])[0]).mean(0).numpy()}
    if found.mask is not None and found.ld_std is not None:
        scores["ld_std"] = float(found.ld_std[0])
        panels = {"EOS attention,\nfirst step": found.mask[0], **panels}
    strip: dict[str, Any] = {}
    if sampler is not None:
        with naming_what_overflows(), torch.inference_mode():
            prompts = model.encode([config.prompt] * config.num_noises)
            columns = sampler.sample(prompts, sampler.noises, every_step=True)
        every = {name: value.cpu().numpy() for name, value in columns.items()}
        steps = every.pop("masks_t")[0] if "masks_t" in every else None
        sampled = Trajectories.of(every)
        windows = {**sampled.windows(), "ld_score": sampled.ld_score}
        scores |= {name: float(values.mean()) for name, values in windows.items() if name != "magnitude"}
        panels |= {} if sampled.be_mask is None else {"BE mask,\nfinal step": sampled.be_mask[0]}
        panels["score-difference\nmap"] = sampled.score_map[0]
        assert sampled.images is not None
        panels["image"] = sampled.images[0]  # drawn: the first noise
        if steps is not None:
            chosen = np.unique(np.linspace(0, config.steps - 1, STRIP).round().astype(int))
            strip = {f"step {step + 1}": steps[step] for step in chosen}
    check_finite(scores)
    draw(config.prompt, panels, strip, config.output)
    return scores


def check_prompt(prompt: str, what: str) -> None:
    """Raise AuditError where a prompt is empty, or holds bytes of the command line that are not UTF-8."""
    if not prompt.strip():
        raise AuditError(f"--prompt: is empty; give the caption to {what}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise AuditError(f"--prompt: character {error.start + 1} is not UTF-8: give the caption in UTF-8") from error


def check_picture(output: str) -> None:
    """Raise AuditError, before any work, where a picture cannot be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(output)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise AuditError(f"-o {output}: cannot be written: give a file in a folder that is there")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise AuditError(f"-o {output}: cannot be written: no kind of picture; there are {', '.join(kinds)}")


def check_finite(scores: Mapping[str, float]) -> None:
    """Raise AuditError where a score is no number."""
    if told := ", ".join(f"{name} {value}" for name, value in scores.items() if not np.isfinite(value)):
        raise AuditError(f"--prompt: scores are not finite: {told}: {OVERFLOW}")


@contextmanager
def naming_what_overflows() -> Iterator[None]:
    """Turn what sampling says of a picture that is not finite into one line that names the flags."""
    try:
        yield
    except NotFinite as error:
        raise AuditError(f"--prompt: {error}: {OVERFLOW}") from error


def draw(prompt: str, panels: dict[str, Any], strip: dict[str, Any], output: str) -> None:
    """Draw maps [H, W] (and an image [H, W, 3]) in a row, and under them the masks by step, to a PNG.

    Raises:
        AuditError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = (2, max(len(strip), len(panels))) if strip else (1, len(panels))
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, values in zip(axes, (panels, strip), strict=False):
        for axis, (title, picture) in zip(line, values.items(), strict=False):
            axis.imshow(picture, cmap=None if picture.ndim == 3 else "magma", interpolation="nearest")
            axis.set_title(title, fontsize=8)
    short = prompt if len(prompt) < 90 else prompt[:87] + "..."
    figure.suptitle(short.replace("$", r"\$"), fontsize=9, x=0.01, ha="left")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt may have letters the font has not
            figure.tight_layout()
            figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise AuditError(f"-o {output}: cannot be written: {error}") from error
    finally:
        plt.close(figure)
