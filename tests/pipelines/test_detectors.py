"""Every detector against values worked out by hand; what a model or a setting has not is left out, not guessed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import pipelines
from pipelines.detectors import DETECTORS, FirstStep, detector, scores
from pipelines.null_maps import NullMaps, Residual

# d is 2 in one channel of the left half of an 8 x 8 grid: E is 4 there and 0 elsewhere
DIFFERENCE = torch.zeros(1, 4, 8, 8)
DIFFERENCE[:, 0, :, :4] = 2
UNCOND = torch.zeros(1, 4, 8, 8)
UNCOND[:, :2] = 1  # at 45 degrees to d where d is not zero
LEFT = torch.zeros(1, 8, 8)
LEFT[..., :4] = 0.5


def whole() -> FirstStep:
    low = FirstStep.of(DIFFERENCE, UNCOND)
    tokens = torch.full((1, 4), 0.25)
    sample = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 8, 8)  # the same in every cell
    # nothing in common, and of what is left the same is usual as of the whole
    residual = Residual.of([torch.zeros(17, 4, 8, 8)], [sample])
    null = NullMaps.of([sample], residual).take(torch.tensor([0]))
    return FirstStep.of(DIFFERENCE, UNCOND, LEFT, tokens, low, guidance_scale=2.0, sigma_max=3.0, null=null)


def test_values_by_hand() -> None:
    found = {name: float(values[0]) for name, values in scores(whole()).items()}
    assert found["magnitude"] == pytest.approx(math.sqrt(32 * 4))
    assert found["ld"] == pytest.approx(0.5 * math.sqrt(32 * 4) / 0.25)
    # the mask is E smoothed by 3 x 3: 4 in columns 0 to 2, 8/3 in column 3, 4/3 in column 4, 0 beyond
    energy = 8 * (3 * 16 + (8 / 3) ** 2) * 4
    assert found["ld_energy"] == pytest.approx(math.sqrt(energy) / (8 * (12 + 8 / 3 + 4 / 3) / 64))
    # 4 on the left, smoothed or not; the sample's median is 2, its 84 % quantile 68 % of the way from 2 to 4, in logs
    assert found["excess"] == pytest.approx(math.log(4 / 2) / (0.68 * math.log(2)))
    assert found["excess_pca"] == pytest.approx(math.log(4 / 2))
    # eps_cfg is 1 + 2 * 2 and 1 in two channels on the left, 1 and 1 on the right
    assert found["webster"] == pytest.approx(9 * (32 * (25 + 1) + 32 * 2) / 256)
    assert found["attention_entropy"] == pytest.approx(math.log(4))
    assert found["cosine"] == found["cosine_low"] == pytest.approx(math.sqrt(0.5) / 2)
    assert found["anisotropy"] == pytest.approx(found["magnitude"] + 2 * found["cosine_low"])


def test_what_is_not_there_is_left_out() -> None:
    found = scores(FirstStep.of(DIFFERENCE))
    assert {"magnitude", "ld_energy"} <= set(found)
    assert not {"ld", "excess", "attention_entropy", "cosine_low", "anisotropy"} & set(found)
    assert set(scores(whole())) == set(DETECTORS)


def test_the_window_that_stands_out_most_decides() -> None:
    """One bright cell shows in the smallest window; a rise everywhere in the whole map, whose spread is less."""
    draw = torch.Generator().manual_seed(0)
    sample = torch.rand((200, 8, 8), generator=draw) + 0.5
    null = NullMaps.of([sample])
    bright, whole = torch.ones(1, 8, 8), torch.full((1, 8, 8), 1.5)
    bright[0, 4, 4] = 30
    for energy, cells in ((bright, (0,)), (whole, (3,))):
        logs = (pipelines.formulas.log_energy(energy) - null.median) / null.spread
        assert logs.amax((0, 2, 3)).argmax().item() in cells
        found = FirstStep.of(torch.ones(1, 1, 8, 8), null=null)
        value = scores(replace(found, energy=energy))["excess"]
        assert value.item() == pytest.approx(logs.amax().item())


def test_a_small_copy_that_the_common_part_covers() -> None:
    """Captions share one direction, in every strength; a copied one has little of it and a few cells of its own."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 8, 8, generator=draw)
    strength = torch.linspace(0.5, 3, 50)[:, None, None, None]
    sample = strength * shared + 0.05 * torch.randn(50, 4, 8, 8, generator=draw)
    copied = 0.6 * shared + 0.05 * torch.randn(4, 8, 8, generator=draw)
    copied[:, 2:4, 2:4] += 0.5
    null = NullMaps.of_differences([sample, sample])
    rows = torch.cat([sample, copied[None]])
    found = scores(FirstStep.of(rows, null=null.take(torch.arange(51) % 2)))
    assert found["excess"].argmax() != 50 and found["magnitude"].argmax() != 50
    assert found["excess_pca"].argmax() == 50 and found["excess_pca"][50] > 3 * found["excess_pca"][:50].max()


def test_what_is_copied_in_the_sample_is_no_common_part() -> None:
    """A fifth of the sample is copied, with more energy than the others: no component is theirs."""
    draw = torch.Generator().manual_seed(0)
    sample, copy = torch.randn(100, 4, 8, 8, generator=draw), torch.zeros(4, 8, 8)
    copy[:, 2:4, 2:4] = 20
    sample[::5] += copy
    parts = pipelines.formulas.common_parts(sample)
    left = pipelines.formulas.less_common(sample, parts)
    assert parts[11:].abs().max() == 0 < parts[10].abs().max()  # one for every eight of the eighty
    flat = parts[1:11].flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(10), atol=1e-5, rtol=0)
    assert left[::5, :, 2:4, 2:4].mean() > 0.8 * 20


def test_a_sample_without_spread_gives_numbers() -> None:
    for sample in (torch.zeros(4, 8, 8), torch.ones(1, 8, 8)):
        found = scores(FirstStep.of(DIFFERENCE, null=NullMaps.of([sample])))["excess"]
        assert math.isfinite(float(found[0]))
    for differences in (torch.zeros(20, 4, 8, 8), torch.ones(1, 4, 8, 8), DIFFERENCE.expand(30, -1, -1, -1)):
        null = NullMaps.of_differences([differences]).take(torch.tensor([0]))
        assert math.isfinite(float(scores(FirstStep.of(DIFFERENCE, null=null))["excess_pca"][0]))


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a detector magnitude already"):

        @detector("again", "nobody")
        def magnitude(first: FirstStep) -> torch.Tensor:
            return first.energy.sum((-2, -1))
