"""A model's scheduler as its folder configures it: what diffusers cannot make of it is an error about the model."""

from __future__ import annotations

import pytest

from pipelines.errors import ModelError
from pipelines.schedules import Edm, VariancePreserving, open_scheduler

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
