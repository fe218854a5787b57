"""`be-audit score`: one prompt, every score printed, its masks drawn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audit.errors import AuditError
from audit.options import option
from audit.scan import DEFAULT_MODEL, find_model_folder

DTYPES = ("auto", "float32", "float16", "bfloat16")
STRIP = 10  # steps shown in the strip


@dataclass(frozen=True)
class ScoreConfig:
    """One prompt and how to score it. Every field is a flag of `be-audit score`."""

    prompt: str = option("", "The prompt.")
    output: str = option("be-audit-score.png", "Picture of mask and maps.", short="-o")
    trajectory: bool = option(False, "Also sample the whole trajectory: image, BE mask, every window, masks by step.")
    model: str = option(DEFAULT_MODEL, "Hub id or diffusers folder; `testbed` is the embedded model.")
    revision: str | None = option(None, "Revision of a hub model.")
    mask_token: str = option("eos", "Whose attention is the mask.", choices=("eos", "bos", "padding"))
    mask_layers: tuple[str, ...] = option((), "Cross-attention layers of the mask; default the paper's two.")
    num_noises: int = option(1, "Initial noises the prompt is scored with.", min=1)
    steps: int = option(50, "Sampling steps.", min=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance scale.")
    seed: int = option(0, "Seed of the noise bank.", min=0, max=2**63 - 1)
    dtype: str = option(
        "auto", "auto is float16 on CUDA, else float32.", choices=("auto", "float32", "float16", "bfloat16")
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")


def score(config: ScoreConfig) -> dict[str, float]:
    """Score one prompt and draw what the scores rest on.

    Returns:
        every score by name; windows under the BE mask too with `trajectory`.
    Raises:
        AuditError: an empty prompt, a model that cannot be loaded, a picture that cannot be written.
    """
    import torch

    from pipelines import FirstStepScorer, MaskSource, ModelError, TrajectorySampler, load

    if not config.prompt.strip():
        raise AuditError("--prompt: is empty; give the caption to score")
    output = Path(config.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise AuditError(f"-o {config.output}: cannot be written: give a file in a folder that is there")
    shared: dict[str, Any] = {
        "num_noises": config.num_noises,
        "seed": config.seed,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
    }
    source = MaskSource("first", config.mask_token, config.mask_layers)  # type: ignore[arg-type]
    try:
        model = load(find_model_folder(config), config.device, config.dtype)
        found = FirstStepScorer(model, source, extra_evaluation=True, **shared)([config.prompt])
        names = ("magnitude", "ld", "ld_std", "ld_energy", "webster", "attention_entropy", "cosine")
        scores = {name: float(getattr(found, name)[0]) for name in (*names, "cosine_low", "anisotropy")}
        panels = {"EOS attention,\nfirst step": found.mask[0], "energy map,\nfirst step": found.energy[0]}
        strip: dict[str, Any] = {}
        if config.trajectory:
            sampler = TrajectorySampler(model, source, **shared)
            with torch.inference_mode():
                prompts = model.encode([config.prompt] * config.num_noises)
                columns = sampler.sample(prompts, sampler.noises, every_step=True)
            every = {name: value.float().cpu().numpy() for name, value in columns.items()}
            scores |= _windows(every)
            numbers = {name: values[0] for name, values in every.items()}  # drawn: the first noise
            panels |= {"BE mask,\nfinal step": numbers["be_mask"], "score-difference\nmap": numbers["score_map"]}
            panels["image"] = numbers["images"].astype(np.uint8)
            chosen = np.unique(np.linspace(0, config.steps - 1, STRIP).round().astype(int))
            strip = {f"step {step + 1}": numbers["masks_t"][step] for step in chosen}
    except (ModelError, ValueError) as error:
        raise AuditError(str(error)) from error
    draw(config.prompt, panels, strip, config.output)
    return scores


def _windows(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the noises, as a scan's."""
    ld, magnitude = columns["ld_t"], columns["magnitude_t"]  # [K, steps]
    return {
        "ld_first": float(ld[:, 0].mean()),
        "ld_10": float(ld[:, :10].mean()),
        "ld_all": float(ld.mean()),
        "magnitude_10": float(magnitude[:, :10].mean()),
        "magnitude_all": float(magnitude.mean()),
        "ld_score": float(columns["ld_score"].mean()),
    }


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
