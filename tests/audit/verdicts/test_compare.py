"""Distances, gates and verdicts against values worked out by hand; the self-calibrated threshold on a real index."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit import testbed
from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.index import Index, IndexConfig, build_index
from audit.statistics.null import Null, NullFacts
from audit.verdicts.compare import (
    References,
    as_trained,
    best_match,
    gate,
    masked_distances,
    masks_at,
    match_image,
    verdict_of,
)
from audit.verdicts.null import local_null


def flat(value: int, size: tuple[int, int] = (2, 2)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def test_masked_distance_by_hand() -> None:
    # one pixel of four differs by 255 in one channel and 51 in another: (1^2 + 0.2^2) = 1.04 under its weight
    image = flat(0)
    image[0, 1] = (255, 51, 0)
    mask = np.array([[[0.1, 0.4], [0.2, 0.1]], [[1, 0], [1, 1]]], np.float32)
    found = masked_distances(image, [flat(0), image], mask)
    assert found[0, 0] == pytest.approx(0.4 * np.sqrt(1.04) / 0.2, rel=1e-6)  # mean of the mask is 0.2
    assert found[0, 1] == 0
    assert found[1, 0] == 0  # the second mask does not see the pixel


def test_scaling_a_mask_changes_no_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(2))
    mask = rng.random((1, 8, 8)).astype(np.float32)
    assert masked_distances(a, [b], mask)[0, 0] == pytest.approx(masked_distances(a, [b], 1000 * mask)[0, 0], rel=1e-5)


def test_the_gate_is_strict_at_one_half() -> None:
    assert gate(3.0, 0.49) == -3.0
    assert gate(3.0, 0.5) == 0.0  # -1[sscd < 0.5]: closed at exactly 0.5
    assert gate(3.0, 0.51) == 0.0


@pytest.mark.parametrize(
    ("sscd", "distance", "verdict"),
    [
        (0.51, 99.0, "global"),
        (0.5, 99.0, "none"),  # a copy only above 0.5
        (0.5, 0.9, "local"),
        (0.1, 1.0, "none"),  # better than the threshold, not equal to it
        (0.1, None, "none"),  # no pixels to compare
        (0.9, None, "global"),
    ],
)
def test_verdict(sscd: float, distance: float | None, verdict: str) -> None:
    assert verdict_of(sscd, distance, threshold=1.0) == verdict


def test_best_match_prefers_the_verdict_then_the_nearer() -> None:
    local_far = {"verdict": "local", "sscd": 0.4, "distance": 0.9}
    local_near = {"verdict": "local", "sscd": 0.3, "distance": 0.2}
    copy_weak = {"verdict": "global", "sscd": 0.6, "distance": 9.0}
    copy_strong = {"verdict": "global", "sscd": 0.9, "distance": 9.5}
    assert best_match([local_far, local_near]) is local_near
    assert best_match([local_near, copy_weak, copy_strong]) is copy_strong
    assert best_match([]) is None


def test_pictures_are_cut_as_in_training() -> None:
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :10], picture[:, 30:] = 255, 255  # the sides a centre crop removes
    assert as_trained(Image.fromarray(picture), (20, 20)).max() == 0
    small = as_trained(Image.fromarray(picture), (10, 10))
    assert small.shape == (10, 10, 3)
    assert small[:, 2:8].max() == 0
    # antialiased: one-pixel stripes become grey, not one of the two colours
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(float(as_trained(Image.fromarray(stripes), (16, 16)).mean()) - 127.5) < 3


def test_masks_at_pixel_size_are_bilinear() -> None:
    mask = np.array([[[0.0, 1.0], [0.0, 1.0]]], np.float32)
    # centres of 4 pixels over 2 cells: 0, 1/4, 3/4, 1
    assert masks_at(mask, (4, 4))[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_p_value_is_never_zero() -> None:
    null = Null(np.array([1.0, 2.0, 3.0]), 1, 1, 1, 0.05, 0.05, 3, 0)
    assert [null.p_value(d) for d in (0.5, 1.0, 2.5, 9)] == [1 / 4, 2 / 4, 3 / 4, 1]
    stored = to_json(NullFacts.of(null))
    assert read_facts(NullFacts, stored, "null.json").null().p_value(2.5) == 3 / 4
    nothing = Null.given(-np.inf, 0.1)
    assert nothing.p_value(1.0) is None
    assert read_facts(NullFacts, to_json(NullFacts.of(nothing)), "null.json").null().threshold == -np.inf


def test_a_verdict_rests_on_a_picture_that_could_be_read() -> None:
    gone = {"verdict": "none", "sscd": 0.45, "distance": None}
    far, near = ({"verdict": "none", "sscd": 0.3, "distance": distance} for distance in (2.0, 1.0))
    assert best_match([gone, far, near]) is near and best_match([gone]) is gone
    local = {"verdict": "local", "sscd": 0.2, "distance": 3.0}
    assert best_match([gone, near, local]) is local


class _Stored:
    """Pixels by id, as References gives them."""

    def __init__(self, pixels: dict[int, np.ndarray | None]) -> None:
        self.pixels = pixels.get


def test_match_image_by_hand() -> None:
    image = flat(0)
    image[0, 0] = 255
    masks = {
        "be_mask": np.array([[0.5, 0.0], [0.0, 0.5]], np.float32),
        "first_mask": np.ones((2, 2), np.float32),
        "energy_mask": np.array([[0.0, 1.0], [1.0, 1.0]], np.float32),
        "score_map": np.array([[4.0, 0.0], [0.0, 0.0]], np.float32),
    }
    facts = {id: {"key": f"k{id}", "url": None, "caption": "c"} for id in (7, 8)}
    neighbours, null = [(7, 0.3, 0), (8, 0.1, -1)], Null.given(0.5, 0.05)
    stored = _Stored({7: flat(0), 8: None})
    near, own = match_image(image, 2, masks, "energy", neighbours, 8, stored, facts, null)  # type: ignore[arg-type]
    root3 = np.sqrt(3.0)  # one pixel differs by 1 in three channels
    assert near["s"] == pytest.approx(-root3)
    assert near["ls"] == pytest.approx(-0.5 * root3)
    assert near["ls_norm"] == pytest.approx(-0.5 * root3 / 0.25)
    assert near["ls_energy"] == 0  # the energy mask does not see the pixel: a perfect local match
    assert near["ls_score"] == pytest.approx(-4 * root3)
    assert (near["distance"], near["verdict"], near["own"]) == (0, "local", False)
    assert (own["own"], own["rank"], own["verdict"], own["image_index"]) == (True, -1, "none", 2)
    assert "distance" not in own  # its pixels are gone: sscd alone was compared
    (copied,) = match_image(image, 0, masks, "energy", [(7, 0.6, 0)], None, stored, facts, null)  # type: ignore[arg-type]
    assert (copied["verdict"], copied["s"], copied["ls_norm"]) == ("global", 0, 0)


# --- the null, on real pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(testbed_index: str) -> Index:
    return Index.open(testbed_index)


def some_masks(count: int = 40) -> np.ndarray:
    """Smooth random masks, 64 x 64."""
    rng = np.random.default_rng(3)
    return masks_at(rng.random((count, 4, 4)).astype(np.float32), (64, 64))


def test_planted_near_duplicates_do_not_move_the_threshold(index: Index, tmp_path: object) -> None:
    before = local_null(index, References(index, (64, 64)), some_masks(), 10, 0.05, 1, 400, 0)
    rows = pq.read_table(testbed.PICTURES).to_pylist()
    planted = []
    for row in rows[:200]:  # re-encoded at a low quality: every one a near-duplicate of its picture
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").save(buffer, "JPEG", quality=60)
        planted.append({**row, "key": f"planted-{row['key']}", "image": {"bytes": buffer.getvalue(), "path": None}})
    file = f"{tmp_path}/more.parquet"
    pq.write_table(pa.Table.from_pylist(rows + planted), file)
    build_index(IndexConfig(images=(file,), output=f"{tmp_path}/ix", sscd="testbed"))
    more = Index.open(f"{tmp_path}/ix")
    after = local_null(more, References(more, (64, 64)), some_masks(), 10, 0.05, 1, 400, 0)
    assert len(more) == len(index) + 200
    assert after.near_duplicates > before.near_duplicates
    assert after.pictures == before.pictures == 400
    assert after.threshold == pytest.approx(before.threshold, rel=0.02)


def test_the_rate_holds_on_pictures_that_were_not_sampled(index: Index) -> None:
    """Calibrated on 300 pictures, the share of fresh ones below the threshold is what was asked for."""
    masks, references = some_masks(), References(index, (64, 64))
    everything = local_null(index, references, masks, 10, 0.1, 1, 10_000, 0)
    null = local_null(index, references, masks, 10, 0.1, 1, 300, 0)
    fresh = np.setdiff1d(everything.distances, null.distances)
    assert len(fresh) > 300
    share = float((fresh < null.threshold).mean())
    assert 0.05 < share < 0.16
    assert null.low <= null.threshold <= null.high


@pytest.mark.parametrize(("sample", "fpr", "below"), [(400, 0.05, 19), (40, 0.05, 1), (99, 0.01, 0), (98, 0.01, None)])
def test_what_is_below_the_threshold_has_a_p_value_of_the_rate_at_most(
    index: Index, sample: int, fpr: float, below: int | None
) -> None:
    """19 null distances of 400 below: the next one would have p = 21 / 401. With 98 no p-value is as small as 1 %."""
    null = local_null(index, References(index, (64, 64)), some_masks(), 10, fpr, 1, sample, 0)
    if below is None:
        assert null.threshold == -np.inf
        return
    assert int((null.distances < null.threshold).sum()) == below
    just_below = float(np.nextafter(null.threshold, 0))
    assert null.p_value(just_below) <= fpr < null.p_value(null.threshold + 1e-9) + 1 / (sample + 1)


def test_more_images_a_candidate_make_each_image_stricter(index: Index) -> None:
    references = References(index, (64, 64))
    one = local_null(index, references, some_masks(), 10, 0.1, 1, 400, 0)
    four = local_null(index, references, some_masks(), 10, 0.1, 4, 400, 0)
    assert four.per_image == pytest.approx(1 - 0.9**0.25)
    assert four.threshold < one.threshold


def test_too_few_pictures_to_calibrate_on_is_said(tmp_path: object) -> None:
    file = f"{tmp_path}/few.parquet"
    pq.write_table(pq.read_table(testbed.PICTURES).slice(0, 12), file)
    build_index(IndexConfig(images=(file,), output=f"{tmp_path}/ix", sscd="testbed"))
    few = Index.open(f"{tmp_path}/ix")
    with pytest.raises(AuditError, match=r"only \d+ pictures .* --ls-threshold"):
        local_null(few, References(few, (64, 64)), some_masks(), 5, 0.05, 1, 400, 0)
