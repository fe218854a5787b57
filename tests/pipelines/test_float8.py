"""Eight bits: products against e4m3 built from its definition, every family, and devices that have it not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines import FirstStepScorer, ModelError, find_model, load
from pipelines.float8 import Float8Linear, check_device, plain_products, quantize, to_float8
from tests.command import be_audit
from tests.tiny import FAMILIES, save_model

CAPTIONS = ["a red house", "two dogs on a very long green street", "cat"]
NARROW = ("sdxl", "playground")  # the tiny ones' layers are no multiples of 16


def e4m3() -> np.ndarray:
    """Every value that is not negative: exponents from -6 to 8, three bits, 448 the largest (the next is nan)."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    large = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array([*small, *large[:-1]])


def rounded(rows: np.ndarray) -> np.ndarray:
    """Rows to the nearest value of e4m3 times the row's scale."""
    grid, scale = e4m3(), np.abs(rows).max(1, keepdims=True) / 448
    nearest = np.abs(np.abs(rows / scale)[..., None] - grid).argmin(-1)
    return np.sign(rows) * grid[nearest] * scale


@pytest.fixture()
def layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(48, 32).requires_grad_(False)


def test_a_layer_multiplies_rounded_rows(layer: nn.Linear) -> None:
    inputs = torch.randn(2, 5, 48) * torch.logspace(-6, 2, 10).reshape(2, 5, 1)  # a scale a row
    found = Float8Linear(layer.bfloat16())(inputs.bfloat16())
    weight, rows = layer.weight.double().numpy(), inputs.bfloat16().double().numpy().reshape(-1, 48)
    expected = rounded(rows) @ rounded(weight).T
    magnitude = np.abs(rounded(rows)) @ np.abs(rounded(weight).T)
    off = np.abs(found.double().numpy().reshape(-1, 32) - expected - layer.bias.double().numpy())
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, 32)
    assert (off <= 2**-7 * (magnitude + np.abs(layer.bias.double().numpy()))).all()  # two roundings to bfloat16
    plain = layer(inputs.bfloat16()).double().numpy().reshape(-1, 32)
    assert np.abs(plain - expected).max() > 0.01, "it is not rounded at all"


def test_a_row_of_zeros_and_a_large_one_stay_finite(layer: nn.Linear) -> None:
    rows = torch.stack([torch.zeros(48), torch.full((48,), 3e38)])
    values, scale = quantize(rows)
    assert values.float()[0].eq(0).all() and values.float()[1].eq(448).all()
    torch.testing.assert_close(values.float() * scale, rows, rtol=1e-6, atol=0)
    assert torch.equal(Float8Linear(layer.bfloat16())(rows[:1].bfloat16())[0], layer.bias)


def test_its_gradient_is_that_of_its_weights(layer: nn.Linear) -> None:
    inputs, back = torch.randn(4, 48, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 32).bfloat16()
    Float8Linear(layer.bfloat16())(inputs).backward(back)
    expected = back.double().numpy() @ rounded(layer.weight.double().numpy())
    assert inputs.grad is not None
    np.testing.assert_allclose(inputs.grad.double().numpy(), expected, atol=2**-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES if kind not in ("sd1", *NARROW))]
)
def test_every_family_is_scored_in_it(kind: str, tmp_path: Path) -> None:
    folder = find_model(str(save_model(kind, tmp_path)))
    exact, eight = (load(folder, "cpu", dtype) for dtype in ("bfloat16", "float8"))
    changed = {name for name, part in eight.denoiser.named_modules() if isinstance(part, Float8Linear)}
    assert changed and not any(word in name for name in changed for word in ("norm", "time_emb", "embedder"))
    assert eight.denoiser.dtype == torch.bfloat16
    found, expected = (FirstStepScorer(model)(CAPTIONS).scores for model in (eight, exact))
    assert found.keys() == expected.keys()
    off = np.abs(found["magnitude"] / expected["magnitude"] - 1)
    assert 0 < off.max() < 0.2  # other than bfloat16's, and of its size
    with plain_products(eight.denoiser):
        np.testing.assert_allclose(FirstStepScorer(eight)(CAPTIONS).scores["magnitude"], found["magnitude"], rtol=1e-2)


def test_a_device_without_it_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch, sd1: str) -> None:
    """As torch says it of an older GPU; the model is not to blame."""
    check_device(torch.device("cpu"))

    def older(*_: object, **__: object) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on compute capability >= 8.9\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", older)
    monkeypatch.setattr("pipelines.loading._load_folder", None)
    line = r"^float8: cpu does not compute in it \(torch._scaled_mm .* >= 8.9\); give float16$"
    with pytest.raises(ModelError, match=line) as refused:
        load(find_model(sd1), "cpu", "float8")
    assert refused.value.about == "dtype"


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no layer that can be computed in it"):
        to_float8(nn.Sequential(nn.Linear(16, 16)))


@pytest.mark.slow
def test_a_run_is_scanned_and_its_captions_mitigated_in_it(tmp_path: Path, sd1: str) -> None:
    (tmp_path / "captions.csv").write_text("\n".join(["TEXT", *CAPTIONS]))
    scan = ("scan", tmp_path / "captions.csv", "-o", tmp_path / "run", "--model", sd1, "--second-look", 0)
    found = be_audit(*scan, "--dtype", "float8")
    assert found.code == 0 and "--dtype float8: this CPU has no instructions for it" in found.err, found
    other = be_audit(*scan, "--dtype", "bfloat16")
    assert other.code == 2 and "dtype" in other.err, "a run has one dtype"
    flags = ("--model", sd1, "--dtype", "float8", "--steps", 2, "--iterations", 2)
    found = be_audit("mitigate", "--prompt", CAPTIONS[0], *flags, "-o", tmp_path / "picture")
    assert found.code == 0, found
