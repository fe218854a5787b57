"""The formulas on numbers small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipelines import formulas
from pipelines.detectors import FirstStep, scores

D = torch.tensor([[[[3.0, 0.0], [1.0, 0.0]], [[4.0, 0.0], [0.0, 2.0]]]])  # d_t, [1, 2, 2, 2]
ENERGY = torch.tensor([[[25.0, 0.0], [1.0, 4.0]]])  # 9 + 16, 0, 1, 4


def test_energy_map_and_magnitude() -> None:
    assert formulas.energy_map(D).tolist() == ENERGY.tolist()
    assert formulas.magnitude(ENERGY).item() == pytest.approx(math.sqrt(30))


def test_ld_weighs_by_the_mask() -> None:
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    # sqrt(1 * 25 + 0.25 * 4) / mean(1, 0, 0, 0.5)
    assert formulas.ld(ENERGY, mask).item() == pytest.approx(math.sqrt(26) / 0.375)
    assert formulas.ld(ENERGY, 7 * mask).item() == pytest.approx(math.sqrt(26) / 0.375)
    assert formulas.ld(ENERGY, torch.ones(1, 2, 2)).item() == pytest.approx(math.sqrt(30))


def test_ld_broadcasts_one_mask_over_steps() -> None:
    energies = torch.stack([ENERGY[0], 4 * ENERGY[0]])[None]  # [1, steps, 2, 2]
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    found = formulas.ld(energies, mask[:, None])
    assert found.tolist() == [[pytest.approx(math.sqrt(26) / 0.375), pytest.approx(2 * math.sqrt(26) / 0.375)]]


def test_ld_without_a_mask_or_with_another_grid() -> None:
    assert formulas.ld(ENERGY, torch.zeros(1, 2, 2)).isnan().all()
    with pytest.raises(ValueError, match="different grids"):
        formulas.ld(ENERGY, torch.ones(1, 3, 3))


def test_energy_mask_counts_cells_inside_the_map_only() -> None:
    energy = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 18.0]]])
    expected = [[9 / 4, 9 / 6, 0.0], [9 / 6, 27 / 9, 18 / 6], [0.0, 18 / 6, 18 / 4]]
    assert formulas.energy_mask(energy)[0].tolist() == [[pytest.approx(v) for v in row] for row in expected]
    assert formulas.energy_mask(energy, 1).tolist() == energy.tolist()
    with pytest.raises(ValueError, match="even"):
        formulas.energy_mask(energy, 2)


def test_no_difference_scores_zero() -> None:
    """A caption that means nothing to the model is not a failed row."""
    nothing = torch.zeros(1, 2, 2)
    assert formulas.magnitude(nothing).item() == 0
    assert formulas.ld(nothing, formulas.energy_mask(nothing)).item() == 0


def test_noise_of_a_v_prediction() -> None:
    v, x = torch.tensor([[[[2.0]]]]), torch.tensor([[[[5.0]]]])
    # abar = 0.36: sqrt(0.36) * 2 + sqrt(0.64) * 5
    assert formulas.noise_from_v(v, x, torch.tensor(0.36)).item() == pytest.approx(5.2)


def test_a_small_difference_of_v_survives_half_precision() -> None:
    """At the first timestep of SD2 eps is nearly x_t: summed in float16, a v of a tenth would lose 4 % of itself."""
    generator = torch.Generator().manual_seed(0)
    x, v, step = (torch.randn(4, 4, 64, 64, generator=generator).half() for _ in range(3))
    other = (v.float() + 0.05 * step.float()).half()
    alpha_bar = torch.tensor(0.0058)
    d = formulas.noise_from_v(other, x, alpha_bar) - formulas.noise_from_v(v, x, alpha_bar)
    exact = alpha_bar.sqrt() * (other.float() - v.float())
    assert float((d - exact).norm() / exact.norm()) < 1e-4


def test_score_difference_map() -> None:
    assert formulas.score_difference_map(ENERGY, noise=0.5)[0, 0, 0].item() == pytest.approx(100)


def test_attention_probabilities() -> None:
    query = torch.tensor([[[[2.0, 0.0]]]])  # one pixel, d = 2
    key = torch.tensor([[[[1.0, 5.0], [0.0, 9.0]]]])  # two tokens: logits 2 and 0, scaled by 0.5
    found = formulas.attention_probabilities(query.half(), key.half(), 0.5)
    assert found.dtype == torch.float32
    assert found[0, 0, 0].tolist() == [pytest.approx(math.e / (math.e + 1)), pytest.approx(1 / (math.e + 1))]


def test_webster() -> None:
    uncond, d = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    # guided with g = 3: 4 and 5; 2^2 * (16 + 25) / 2
    assert formulas.webster(uncond, d, 3.0, 2.0).item() == pytest.approx(82)


def test_cosine_and_anisotropy() -> None:
    uncond = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # pixels (1, 0) and (0, 1)
    d = torch.tensor([[[[2.0, 3.0]], [[0.0, 4.0]]]])  # (2, 0) and (3, 4): cosines 1 and 0.8
    cosine = formulas.cosine(uncond, d)
    assert cosine.item() == pytest.approx(0.9)
    assert formulas.anisotropy(torch.tensor([10.0]), cosine, (1.0, 2.0)).item() == pytest.approx(11.8)
    assert formulas.anisotropy(torch.tensor([10.0]), cosine, (2.0, 1.0)).item() == pytest.approx(20.9)


def test_anisotropy_has_the_authors_weights_of_each_family() -> None:
    assert [formulas.anisotropy_weights(width) for width in (768, 1024, 2048)] == [(1, 2), (1, 0.1), (1, 2)]
    difference, low = torch.ones(1, 4, 2, 2), FirstStep.of(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    for weights, expected in (((1.0, 2.0), 4 + 2), ((1.0, 0.1), 4 + 0.1)):  # magnitude 4, cosine 1
        first = FirstStep.of(difference, low=low, anisotropy_weights=weights)
        assert scores(first)["anisotropy"].item() == pytest.approx(expected)


def test_attention_entropy() -> None:
    found = formulas.attention_entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    assert found.tolist() == [pytest.approx(math.log(2)), 0.0]


def test_resize_mask_is_bilinear() -> None:
    mask = torch.tensor([[[0.0, 4.0]]])
    # centres of four cells over two: 0, a quarter, three quarters, all
    assert formulas.resize_mask(mask, (1, 4))[0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert formulas.resize_mask(mask.half(), (1, 2)).dtype == torch.float32


@pytest.mark.parametrize("mask, expected", [(None, 5.0), (torch.tensor([[1.0, 0.5]]), math.sqrt(9 + 4))])
def test_image_distance(mask: Tensor | None, expected: float) -> None:
    generated, reference = torch.zeros(3, 1, 2), torch.zeros(3, 1, 2)
    generated[0, 0, 0], reference[1, 0, 1] = 3.0, 4.0
    assert formulas.image_distance(generated, reference, mask).item() == pytest.approx(expected)


def test_gate_is_closed_at_exactly_one_half() -> None:
    distance, sscd = torch.tensor([5.0, 5.0, 5.0]), torch.tensor([0.4999, 0.5, 0.9])
    assert formulas.gated(distance, sscd).tolist() == [-5.0, 0.0, 0.0]


def test_half_precision_is_reduced_in_float32() -> None:
    """A sum of 4096 squares of 8 overflows float16 (65504)."""
    d = torch.full((1, 1, 64, 64), 8.0, dtype=torch.float16)
    energy = formulas.energy_map(d)
    assert formulas.magnitude(energy).item() == pytest.approx(8 * 64)
    assert formulas.webster(d, d, 0.0, 1.0).item() == pytest.approx(64)
    assert formulas.image_distance(d, torch.zeros_like(d)).item() == pytest.approx(8 * 64)
