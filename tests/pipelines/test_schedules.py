"""A model's scheduler as its folder configures it: levels, units, and what is an error about the model or the steps."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from pipelines.errors import ModelError
from pipelines.schedules import Edm, FlowMatching, FlowSigmas, VariancePreserving, open_scheduler

ALLOWED = (VariancePreserving, Edm)


@pytest.mark.parametrize(
    ("name", "field", "value", "raises"),  # what diffusers raises, each another type
    [
        ("DDIMScheduler", "num_train_timesteps", None, TypeError),
        ("DDIMScheduler", "num_train_timesteps", -1, RuntimeError),
        ("DDIMScheduler", "beta_schedule", "x", NotImplementedError),
        ("PNDMScheduler", "num_train_timesteps", 0, IndexError),
        ("LMSDiscreteScheduler", "num_train_timesteps", 0, ValueError),
        ("DPMSolverSinglestepScheduler", "solver_order", -1, UnboundLocalError),
        ("EDMEulerScheduler", "rho", 0, ZeroDivisionError),
    ],
)
def test_a_value_diffusers_fails_on_is_a_model_error(
    name: str, field: str, value: object, raises: type[Exception]
) -> None:
    with pytest.raises(ModelError, match=rf"not taken by {name}: .") as found:
        open_scheduler(name, {field: value}, ALLOWED)
    assert isinstance(found.value.__cause__, raises) and "\n" not in str(found.value)


def test_a_scheduler_whose_library_is_missing_says_which() -> None:  # nothing here installs torchsde
    with pytest.raises(ModelError, match=r"DPMSolverSDEScheduler: .*torchsde"):
        open_scheduler("DPMSolverSDEScheduler", {}, ALLOWED)


CPU = torch.device("cpu")
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("shift", [1.0, 1.18, 1.32, 1.43, 1.59, 1.66, 1.92, 2.32, 2.61, 3.0, 12.0])
def test_a_flow_begins_without_signal_whatever_its_shift_rounds_to(shift: float) -> None:
    """float32 sigmas begin up to 1.2e-7 off 1, above and below."""
    schedule = FlowMatching(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    schedule.check()
    for steps in (1, 4, 28, 50):
        first, *others = schedule.levels(steps, CPU)
        assert (first.signal, schedule.unit(steps)) == (0.0, "velocity")
        assert schedule.factor(first, schedule.unit(steps)) == 1.0
        assert all(level.signal > 1e-3 for level in others)


def test_what_a_file_leaves_out_is_its_own_classs_default() -> None:
    """And not that of the DDIM its levels are taken from: other betas for LCM, other spacing for DPM-Solver."""
    for name in ("LCMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"):
        own = open_scheduler(name, {}, ALLOWED)
        schedule = VariancePreserving(own)
        torch.testing.assert_close(schedule.scheduler.alphas_cumprod, own.alphas_cumprod)
        if name != "LCMScheduler":
            assert schedule.scheduler.config.timestep_spacing == own.config.timestep_spacing


@pytest.mark.parametrize("name", ("LCMScheduler", "TCDScheduler"))
def test_a_distilled_schedule_begins_where_its_own_scheduler_does(name: str) -> None:
    own = getattr(diffusers, name)(**SD)  # timestep_spacing: leading, which it does not look at
    schedule = VariancePreserving(own)
    for steps in (1, 2, 4, 8, 50):
        own.set_timesteps(steps)
        assert int(schedule.levels(steps, CPU)[0].timestep) == int(own.timesteps[0]) == 999
        assert schedule.check_steps(steps) == ""


@pytest.mark.parametrize(
    ("spacing", "steps", "begins", "share"),
    [
        ("leading", 50, 981, None),
        ("leading", 10, 901, None),
        ("leading", 4, 751, "6%"),
        ("leading", 2, 501, "27%"),
        ("trailing", 1, 999, None),  # SDXL turbo's, at the one step it is distilled to
        ("trailing", 4, 999, None),
        ("linspace", 2, 999, None),
    ],
)
def test_steps_too_few_to_begin_near_noise_are_said(spacing: str, steps: int, begins: int, share: str | None) -> None:
    schedule = VariancePreserving(diffusers.DDIMScheduler(**SD, timestep_spacing=spacing))
    assert int(schedule.levels(steps, CPU)[0].timestep) == begins
    said = schedule.check_steps(steps)
    assert (said == "") if share is None else f"{steps}: sampling begins at timestep {begins}" in said and share in said


@pytest.mark.parametrize(
    ("options", "steps", "about", "said"),
    [
        (
            {},
            1,
            "steps",
            r"1: sampling begins at timestep 1, .* 100% .*: give more steps \(50\), or set timestep_spacing",
        ),
        ({}, 1001, "steps", "1001: this model has 1000 timesteps"),
        ({}, 1000, "model", "steps_offset 1 puts the first of 1000 steps at timestep 1000, .* 999: give fewer --steps"),
        ({"steps_offset": 30}, 50, "model", "steps_offset 30 puts the first of 50 steps at timestep 1010"),
    ],
)
def test_steps_a_schedule_has_not_are_refused(options: dict[str, int], steps: int, about: str, said: str) -> None:
    schedule = VariancePreserving(diffusers.DDIMScheduler(**{**SD, **options}))
    with pytest.raises(ModelError, match=said) as found:
        schedule.check_steps(steps)
    assert found.value.about == about


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("DPMSolverMultistepScheduler", "use_karras_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_exponential_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_beta_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "final_sigmas_type", "sigma_min"),
        ("UniPCMultistepScheduler", "use_karras_sigmas", True),
        ("UniPCMultistepScheduler", "use_dynamic_shifting", True),
        ("UniPCMultistepScheduler", "shift_terminal", 0.1),
    ],
)
def test_a_field_that_moves_the_levels_of_a_flow_is_refused(name: str, field: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"sets {field} to {value!r}, which moves its levels from those of its"):
        FlowSigmas(getattr(diffusers, name)(**FLOW, **{field: value}))


@pytest.mark.parametrize("name", FlowSigmas.classes)
def test_what_says_how_a_flow_is_solved_is_left_to_it(name: str) -> None:
    scheduler = getattr(diffusers, name)(**FLOW, solver_order=3, timestep_spacing="trailing", thresholding=True)
    assert FlowSigmas(scheduler).scheduler.config.shift == 3.0
    # DPM-Solver shifts dynamically where a pipeline tells it by how much, and Sana's does not
    if name == "DPMSolverMultistepScheduler":
        FlowSigmas(getattr(diffusers, name)(**FLOW, use_dynamic_shifting=True))
