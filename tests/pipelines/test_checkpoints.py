"""What a single checkpoint says of its training is what it is sampled by, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from pipelines import ModelError, find_model
from pipelines.folders import ModelFolder
from pipelines.schedules import Edm, VariancePreserving
from tests.tiny import SCHEDULE, save_model

ON, NETWORK = torch.tensor([]), {"model.diffusion_model.out.0.weight": torch.zeros(2)}
MEANS, DEVIATIONS = torch.tensor([-1.6, 1.9, -1.4, 2.5]), torch.tensor([8.5, 5.9, 6.6, 5.2])
BETAS = DDIMScheduler(**SCHEDULE).betas
SIGNAL = (1 - BETAS).cumprod(0)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def configs(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configs")
    return {**model_folders, **{kind: save_model(kind, root / kind) for kind in ("playground", "zero_snr", "sd3")}}


@pytest.fixture
def found(configs: dict[str, Path], tmp_path: Path) -> Any:
    """Finds a checkpoint of some tensors beside a U-Net's; nothing else of it is read before it is loaded."""

    def find(kind: str, tensors: State, **metadata: str) -> ModelFolder:
        save_file({**NETWORK, **tensors}, tmp_path / "one.safetensors", metadata=metadata or None)
        return find_model(str(tmp_path / "one.safetensors"), model_config=str(configs[kind]))

    return find


def notes(folder: ModelFolder) -> list[str]:
    return [note.removeprefix(f"{folder.name}: ").replace(str(folder.path), "FOLDER") for note in folder.notes]


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))  # PNDM, which has no such setting, and DDIM
def test_zero_terminal_snr_is_the_files(found: Any, kind: str) -> None:
    """NoobAI-XL's v-prediction: its own schedule, whatever the folder of plain SDXL beside it says."""
    folder = found(kind, {"v_pred": ON, "ztsnr": ON})
    schedule = folder.schedule()
    assert isinstance(schedule, VariancePreserving) and schedule.v_prediction and schedule.sigma_max is None
    assert notes(folder) == [
        "prediction type v_prediction, from the file's tensor v_pred",
        "rescale betas zero snr True, from the file's tensor ztsnr",
    ]
    assert found(kind, {}).schedule().sigma_max == pytest.approx(float((1 / SIGNAL[-1] - 1) ** 0.5), rel=1e-5)


def test_zero_terminal_snr_of_a_model_of_noise_is_refused(found: Any) -> None:
    with pytest.raises(ModelError, match="ends without signal"):
        found("sdxl", {"ztsnr": ON})


def test_the_noise_of_cosxl_is_the_files(found: Any) -> None:
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.25)}
    folder = found("playground", marks)
    schedule = folder.schedule()
    assert isinstance(schedule, Edm) and (schedule.sigma_max, schedule.data, schedule.sign) == (120, 1, -1)
    assert folder.scheduler_config()["sigma_min"] == 0.25
    with pytest.raises(
        ModelError, match=r"sigma_max says .* other noise than .*scheduler_config.json has: give a .*EDM"
    ):
        found("sdxl", marks)
    with pytest.raises(ModelError, match=r"its tensor edm_vpred\.sigma_max is not taken"):
        found("playground", {"edm_vpred.sigma_max": ON})


def test_playground_as_one_file(found: Any) -> None:
    marks = {"edm_mean": MEANS.half()[None, :, None, None], "edm_std": DEVIATIONS.half()[None, :, None, None]}
    folder = found("playground", marks)
    schedule = folder.schedule()
    assert isinstance(schedule, Edm) and (schedule.sigma_max, schedule.data, schedule.sign) == (80, 0.5, 1)
    with pytest.raises(ModelError, match=r"edm_\w+ says that it was trained on other noise than"):
        found("sdxl", marks)
    for name, setting in (("edm_mean", "latents_mean"), ("edm_std", "latents_std")):
        with pytest.raises(
            ModelError, match=rf"tensor {name} says that {setting} is \[.*/vae/config.json has \[.*: set it"
        ):
            found("playground", {**marks, name: marks[name] + 1})


@pytest.mark.parametrize(
    "buffers",
    [
        {
            "alphas_cumprod": SIGNAL,
            "betas": BETAS,
            "alphas_cumprod_prev": SIGNAL + 0,
            "posterior_mean_coef1": BETAS + 0,
        },
        {"alphas_cumprod": SIGNAL.half()},
        {"betas": BETAS.bfloat16()},
        {"denoiser.sigmas": (1 / SIGNAL - 1).sqrt().half()},
    ],
)
def test_levels_that_trainers_leave_are_the_schedules(found: Any, buffers: State) -> None:
    """ldm's and sgm's buffers, as published files have them, in whatever dtype."""
    assert notes(found("sdxl", buffers)) == ["prediction type epsilon, from FOLDER"]
    with pytest.raises(ModelError, match=r"its tensor (\S+) has other noise levels than .*set its betas"):
        found("zero_snr", buffers)


@pytest.mark.parametrize(
    "buffers", ({"betas": BETAS[:500]}, {"alphas_cumprod": SIGNAL**1.1}, {"denoiser.sigmas": BETAS})
)
def test_other_levels_are_refused(found: Any, buffers: State) -> None:
    with pytest.raises(ModelError, match="has other noise levels than") as refused:
        found("sdxl", buffers)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ("modelspec.prediction_type", "modelspec.predict_key"))
@pytest.mark.parametrize("said, expected", [("v", "v_prediction"), ("epsilon", "epsilon"), ("eps", "epsilon")])
def test_the_metadata_says_what_the_output_is(found: Any, key: str, said: str, expected: str) -> None:
    folder = found("sd2" if expected == "epsilon" else "sd1", {}, **{key: said})
    assert folder.scheduler_config()["prediction_type"] == expected
    assert notes(folder) == [f"prediction type {expected}, from the file's metadata"]


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        (
            {"v_pred": ON},
            {"modelspec.predict_key": "epsilon"},
            "tensor v_pred says that prediction_type is v_prediction, ",
        ),
        (
            {},
            {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"},
            "metadata says that prediction_type is",
        ),
        ({}, {"modelspec.prediction_type": "x0"}, "prediction type is 'x0'; read are epsilon and v_prediction"),
        (
            {"lora_unet_x.alpha": ON},
            {},
            "1 tensors are of no network and nothing here reads them, lora_unet_x.alpha the first",
        ),
        ({"scale_factor": ON, "control_model.x": ON}, {}, "2 tensors are of no network .*control_model.x the first"),
        ({"edm_v2.sigma": ON}, {}, "1 tensors are of no network .*give a diffusers folder of it"),
    ],
)
def test_what_a_file_says_twice_or_nobody_reads_is_refused(
    found: Any, tensors: State, metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        found("sd1", tensors, **metadata)
    assert "\n" not in str(refused.value)


def test_averaged_weights_are_left_out_and_that_is_said(found: Any) -> None:
    averaged = {f"model_ema.{name}": torch.tensor(1) for name in ("decay", "num_updates", "diffusion_modelout0weight")}
    assert notes(found("sd1", averaged))[1:] == ["3 tensors of averaged weights (model_ema) are left out"]


def test_flows_have_no_prediction_type_to_tell(found: Any) -> None:
    assert notes(found("sd3", {})) == []
    with pytest.raises(ModelError, match="its tensor v_pred says that it was trained on other noise"):
        found("sd3", {"v_pred": ON})


def test_a_quantised_configuration_is_refused(configs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(configs["sd1"], tmp_path / "folder"))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gguf"}}))
    save_file(NETWORK, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"unet/config.json has a quantization_config \(gguf\)"):
        find_model(str(tmp_path / "one.safetensors"), model_config=str(folder))
