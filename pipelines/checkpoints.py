"""What a single checkpoint says of its own training, beside its networks: in its metadata and in tensors of their own.

diffusers' conversion reads the networks alone, so a model would be sampled by whatever schedule the configuration
beside it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from pipelines.configurations import reading
from pipelines.errors import ModelError
from pipelines.schedules import Edm, Schedule, VariancePreserving

NETWORKS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.")
"""How the names of the tensors begin that diffusers converts (its loaders/single_file_utils.py)."""
SECOND = "model_ema."
"""Averaged weights beside those that are loaded: diffusers and other programs leave them out, too."""
DERIVED = re.compile(
    r"(alphas_cumprod_prev|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar)"
)
"""Buffers of the original trainers that are functions of `alphas_cumprod`, or of their loss alone."""
PREDICTIONS = ("modelspec.prediction_type", "modelspec.predict_key")
"""Keys of the metadata that say what the output is: Stability's ModelSpec, and ComfyUI's."""
PLAYGROUND = {"prediction_type": "epsilon", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


@dataclass(frozen=True)
class Mark:
    """What a tensor beside the networks says.

    Attributes:
        kinds: of schedule that it is said of. scheduler: settings of the scheduler by its values.
        vae: settings of the VAE. signal: a^2 of every level.
    """

    kinds: tuple[type[Schedule], ...]
    scheduler: Callable[[list[float]], dict[str, Any]] = lambda _: {}
    vae: Callable[[list[float]], dict[str, Any]] = lambda _: {}
    signal: Callable[[list[float]], list[float]] = lambda _: []


MARKS: Mapping[str, Mark] = {
    "v_pred": Mark((VariancePreserving, Edm), lambda _: {"prediction_type": "v_prediction"}),
    "ztsnr": Mark((VariancePreserving,), lambda _: {"rescale_betas_zero_snr": True}),
    "edm_vpred.sigma_max": Mark(
        (Edm,), lambda values: {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": values[0]}
    ),
    "edm_vpred.sigma_min": Mark((Edm,), lambda values: {"sigma_min": values[0]}),
    "edm_mean": Mark((Edm,), lambda _: PLAYGROUND, lambda values: {"latents_mean": values, "scaling_factor": 0.5}),
    "edm_std": Mark((Edm,), vae=lambda values: {"latents_std": values}),
    "alphas_cumprod": Mark((VariancePreserving,), signal=list),
    "betas": Mark((VariancePreserving,), signal=lambda values: list(accumulate((1 - beta for beta in values), mul))),
    "denoiser.sigmas": Mark(
        (VariancePreserving,), signal=lambda values: [1 / (1 + sigma**2) for sigma in sorted(values)]
    ),
}
"""Tensors that ComfyUI writes and reads (comfy/supported_models.py, comfy_extras/nodes_model_merging.py: noise of
CosXL and Playground v2.5, zero terminal SNR) and buffers that Stability's trainers leave (ldm's DDPM, sgm's
DiscreteDenoiser)."""


@dataclass(frozen=True)
class Statements:
    """What a checkpoint says of its training.

    Attributes:
        scheduler: settings of the scheduler, which go before the configuration's. sources: what says each of them.
        marks: of `MARKS` that are there, with their values. second: tensors of averaged weights, which are left out.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, list[float]] = field(default_factory=dict)
    second: int = 0


def read_statements(checkpoint: Path) -> Statements:
    """What a .safetensors checkpoint says of its training.

    Raises:
        ModelError: it cannot be read, says two things of one setting, or has a tensor that nothing reads.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(checkpoint), framework="pt") as file:
            said, names = file.metadata() or {}, [name for name in file.keys() if not name.startswith(NETWORKS)]  # noqa: SIM118
            marks = {name: file.get_tensor(name).float().flatten().tolist() for name in names if name in MARKS}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{checkpoint}: cannot be read: {error}") from error
    second = [name for name in names if name.startswith(SECOND)]
    unknown = sorted({name for name in names if not DERIVED.fullmatch(name)} - set(second) - set(marks))
    if unknown:
        raise ModelError(
            f"{checkpoint}: {len(unknown)} tensors are of no network and nothing here reads them, {unknown[0]} the "
            "first: what they say of the model would be lost; give a diffusers folder of it, or save it without them"
        )
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    stated = [
        ("the file's metadata", {"prediction_type": _prediction(said[key])}) for key in PREDICTIONS if said.get(key)
    ]
    for name, values in marks.items():
        with reading(f"{checkpoint}: its tensor {name}"):
            stated.append((f"the file's tensor {name}", MARKS[name].scheduler(values)))
    for source, found in stated:
        for setting, value in found.items():
            if settings.setdefault(setting, value) != value:
                raise ModelError(
                    f"{checkpoint}: {source} says that {setting} is {value}, {sources[setting]} that it is "
                    f"{settings[setting]}: save it without the one that is wrong"
                )
            sources.setdefault(setting, source)
    return Statements(settings, sources, marks, len(second))


def _prediction(said: str) -> str:
    """diffusers' word for a prediction type; one that it has none for stays, for the schedule to refuse."""
    return "v_prediction" if said.startswith("v") else "epsilon" if said.startswith("eps") else said


def check_statements(statements: Statements, schedule: Schedule, vae: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration that a checkpoint's marks contradict.

    Args:
        statements: of the checkpoint. schedule: of the configuration, with their settings. vae: its configuration.
        folder: where the configuration lies.

    Raises:
        ModelError: another kind of noise, other levels, or another scale of the latents.
    """
    scheduler = f"{folder}/scheduler/scheduler_config.json"
    for name, values in statements.marks.items():
        mark = MARKS[name]
        if not isinstance(schedule, mark.kinds):
            classes = ", ".join(each for kind in mark.kinds for each in kind.classes)
            raise ModelError(
                f"its tensor {name} says that it was trained on other noise than {scheduler} has: give a folder whose "
                f"scheduler is one of {classes}"
            )
        with reading(f"its tensor {name}"):
            signal, settings = mark.signal(values), mark.vae(values)
        if signal and not _same(signal, schedule.scheduler.alphas_cumprod.tolist()):
            raise ModelError(
                f"its tensor {name} has other noise levels than {scheduler}: set its betas to them, or "
                "rescale_betas_zero_snr where they end in none"
            )
        for setting, value in settings.items():
            if not _same(value, vae.get(setting)):
                raise ModelError(
                    f"its tensor {name} says that {setting} is {value}, but {folder}/vae/config.json has "
                    f"{vae.get(setting)}: set it there"
                )


def _same(one: Any, other: Any) -> bool:
    """Whether numbers or lists of numbers are the same but for half precision; what a schedule ends with counts."""
    if isinstance(one, list):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(_same, one, other))
    return isinstance(other, (int, float)) and math.isclose(one, other, rel_tol=0.01, abs_tol=0.001)
