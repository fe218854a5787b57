"""Every detector against values worked out by hand; what a model or a setting has not is left out, not guessed."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.detectors import DETECTORS, FirstStep, detector, scores

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
    return FirstStep.of(DIFFERENCE, UNCOND, LEFT, tokens, low, guidance_scale=2.0, sigma_max=3.0)


def test_values_by_hand() -> None:
    found = {name: float(values[0]) for name, values in scores(whole()).items()}
    assert found["magnitude"] == pytest.approx(math.sqrt(32 * 4))
    assert found["ld"] == pytest.approx(0.5 * math.sqrt(32 * 4) / 0.25)
    # the mask is E smoothed by 3 x 3: 4 in columns 0 to 2, 8/3 in column 3, 4/3 in column 4, 0 beyond
    energy = 8 * (3 * 16 + (8 / 3) ** 2) * 4
    assert found["ld_energy"] == pytest.approx(math.sqrt(energy) / (8 * (12 + 8 / 3 + 4 / 3) / 64))
    # eps_cfg is 1 + 2 * 2 and 1 in two channels on the left, 1 and 1 on the right
    assert found["webster"] == pytest.approx(9 * (32 * (25 + 1) + 32 * 2) / 256)
    assert found["attention_entropy"] == pytest.approx(math.log(4))
    assert found["cosine"] == found["cosine_low"] == pytest.approx(math.sqrt(0.5) / 2)
    assert found["anisotropy"] == pytest.approx(found["magnitude"] + 2 * found["cosine_low"])


def test_what_is_not_there_is_left_out() -> None:
    found = scores(FirstStep.of(DIFFERENCE))
    assert {"magnitude", "ld_energy"} <= set(found)
    assert not {"ld", "attention_entropy", "cosine_low", "anisotropy"} & set(found)
    assert set(scores(whole())) == set(DETECTORS)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a detector magnitude already"):

        @detector("again", "nobody")
        def magnitude(first: FirstStep) -> torch.Tensor:
            return first.energy.sum((-2, -1))
