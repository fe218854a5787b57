"""Distances, gates and verdicts against values worked out by hand; the self-calibrated threshold on a real index."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import betabinom

from audit import testbed
from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.index import Index, IndexConfig, build_index
from audit.statistics.null import PICTURES, Null, NullFacts, sample_needed
from audit.verdicts.compare import (
    MaskedImage,
    Neighbour,
    References,
    as_trained,
    best_match,
    best_verdict,
    decide,
    gate,
    masks_at,
    match_image,
    verdict_of,
)
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.null import check_pictures, draw_pictures, pictures_null, threads


def flat(value: int, size: tuple[int, int] = (2, 2)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def test_masked_distance_by_hand() -> None:
    # one pixel of four differs by 255 in one channel and 51 in another: (1^2 + 0.2^2) = 1.04 under its weight
    image = flat(0)
    image[0, 1] = (255, 51, 0)
    masked = MaskedImage(image, np.array([[[0.1, 0.4], [0.2, 0.1]], [[1, 0], [1, 1]]], np.float32))
    far, same = masked.compare(flat(0)), masked.compare(image)
    assert far.distances[0] == pytest.approx(0.4 * np.sqrt(1.04) / 0.2, rel=1e-6)  # mean of the mask is 0.2
    assert far.distances[1] == 0  # the second mask does not see the pixel
    assert far.plain == pytest.approx(np.sqrt(1.04), rel=1e-6)
    assert same.distances.tolist() == [0, 0] and same.plain == 0


def reference_concordance(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Weighted concordance correlation (Lin 1989), channels summed, in float64 and in so many words."""
    weights = (mask.astype(float) ** 3 / (mask.astype(float) ** 3).sum())[..., None]
    x, y = a / 255.0, b / 255.0
    mean_x, mean_y = (weights * x).sum((0, 1)), (weights * y).sum((0, 1))
    of = lambda u, v: float((weights * u * v).sum())  # noqa: E731
    x, y, shift = x - mean_x, y - mean_y, float(np.square(mean_x - mean_y).sum())
    return 2 * of(x, y) / (of(x, x) + of(y, y) + shift + 3 * 0.03**2)


def test_correlation_distance_against_a_reference_in_float64() -> None:
    rng = np.random.default_rng(0)
    for size in ((8, 8), (65, 33)):
        a = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        near = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
        masks = rng.random((3, *size)).astype(np.float32) ** 4
        masked = MaskedImage(a, masks)
        for b in (near, rng.integers(0, 256, a.shape).astype(np.uint8), 255 - a):
            expected = [1 - reference_concordance(a, b, mask) for mask in masks]
            np.testing.assert_allclose(masked.compare(b).correlation_distances, expected, atol=2e-6)


def test_plain_regions_are_no_evidence_and_another_colour_is_a_difference() -> None:
    rng = np.random.default_rng(1)
    drawn = rng.integers(40, 160, (16, 16, 3)).astype(np.uint8)
    mask = np.ones((1, 16, 16), np.float32)
    blank = MaskedImage(flat(90, (16, 16)), mask)
    assert blank.compare(flat(90, (16, 16))).distances[0] == 0
    assert blank.compare(flat(90, (16, 16))).correlation_distances[0] == 1  # alike, but nothing is drawn there
    assert blank.compare(drawn).correlation_distances[0] == 1
    masked = MaskedImage(drawn, mask)
    same, recoloured = masked.compare(drawn), masked.compare(drawn + np.uint8([60, 0, 20]))
    variance = float((drawn / 255.0).var((0, 1)).sum())
    shift = (60**2 + 20**2) / 255**2
    assert same.correlation_distances[0] == pytest.approx(0.0027 / (2 * variance + 0.0027), rel=1e-4)
    expected = (shift + 0.0027) / (shift + 2 * variance + 0.0027)
    assert recoloured.correlation_distances[0] == pytest.approx(expected, rel=1e-4) and expected > 0.15
    assert masked.compare(np.uint8(200 - drawn)).correlation_distances[0] > 1.5  # the negative


def test_a_sharp_mask_keeps_a_small_region_from_what_lies_around_it() -> None:
    """A corner of the picture is copied, and the mask is four times as large there as elsewhere."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(2))
    b[:8, :8] = a[:8, :8]
    mask = np.full((1, 32, 32), 0.25, np.float32)
    mask[0, :8, :8] = 1
    # copied 64 pixels of weight 1, others 960 of weight 1/64: 64 of 79 of what is seen is the same
    assert MaskedImage(a, mask).compare(b).correlation_distances[0] == pytest.approx(15 / 79, abs=0.04)


def test_a_mask_that_sees_nothing_says_nothing() -> None:
    found = MaskedImage(flat(3), np.zeros((1, 2, 2), np.float32)).compare(flat(9))
    assert (found.distances[0], found.correlation_distances[0]) == (0, 1)


def test_scaling_a_mask_changes_no_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(2))
    mask = rng.random((1, 8, 8)).astype(np.float32)
    one, other = MaskedImage(a, mask).compare(b), MaskedImage(a, 1000 * mask).compare(b)
    assert one.distances[0] == pytest.approx(other.distances[0], rel=1e-5)
    assert one.correlation_distances[0] == pytest.approx(other.correlation_distances[0], rel=1e-5)


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
    local_far = {"verdict": "local", "sscd": 0.4, "correlation_distance": 0.9}
    local_near = {"verdict": "local", "sscd": 0.3, "correlation_distance": 0.2}
    copy_weak = {"verdict": "global", "sscd": 0.6, "correlation_distance": 9.0}
    copy_strong = {"verdict": "global", "sscd": 0.9, "correlation_distance": 9.5}
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


def test_a_null_is_stored_as_it_is() -> None:
    null = Null.of(PICTURES, np.array([3.0, 1.0, 2.0]), 0.5, draws=1, near_duplicates=4)
    back = read_facts(NullFacts, to_json(NullFacts.of(null)), "null.json").null()
    np.testing.assert_array_equal(back.statistics, [1, 2, 3])
    assert (back.threshold, back.draws, back.near_duplicates, back.fpr) == (null.threshold, 1, 4, 0.5)
    nothing = read_facts(NullFacts, to_json(NullFacts.of(Null.given(-np.inf, 0.1))), "null.json").null()
    assert nothing.threshold == -np.inf and nothing.p_value(0.1) is None


def test_a_verdict_rests_on_a_picture_that_could_be_read() -> None:
    gone = {"verdict": "none", "sscd": 0.45, "correlation_distance": None}
    far, near = ({"verdict": "none", "sscd": 0.3, "correlation_distance": distance} for distance in (2.0, 1.0))
    assert best_match([gone, far, near]) is near and best_match([gone]) is gone
    local = {"verdict": "local", "sscd": 0.2, "correlation_distance": 3.0}
    assert best_match([gone, near, local]) is local


class _Stored:
    """Pixels by id, as References gives them."""

    def __init__(self, pixels: dict[int, np.ndarray | None]) -> None:
        self.pixels = pixels.get
        self.unreadable = {8: "8.jpg: gone"}


def test_match_image_by_hand() -> None:
    image = flat(0)
    image[0, 0] = 255
    masks = {
        "be_mask": np.array([[0.5, 0.0], [0.0, 0.5]], np.float32),
        "first_mask": np.ones((2, 2), np.float32),
        "energy_mask": np.array([[0.0, 1.0], [1.0, 1.0]], np.float32),
        "score_map": np.array([[4.0, 0.0], [0.0, 0.0]], np.float32),
    }
    facts = {id: {"key": f"k{id}", "url": None, "caption": "c"} for id in (7, 8, 9)}
    stored = _Stored({7: flat(0), 8: None, 9: image})
    neighbours = [Neighbour(7, 0.3, 0), Neighbour(9, 0.2, 1), Neighbour(8, 0.1, -1)]
    near, same, own = match_image(image, 2, masks, neighbours, 8, stored, facts)  # type: ignore[arg-type]
    root3 = np.sqrt(3.0)  # one pixel differs by 1 in three channels
    assert near["s"] == pytest.approx(-root3)
    assert near["ls"] == pytest.approx(-0.5 * root3)
    assert near["ls_norm"] == pytest.approx(-0.5 * root3 / 0.25)
    assert near["ls_energy"] == 0  # the energy mask does not see the pixel
    assert near["ls_score"] == pytest.approx(-4 * root3)
    assert near["ls_corr"] == -1  # nothing is drawn where the energy mask looks: nothing in common
    assert near["distance_final"] == pytest.approx(0.5 * root3 / 0.25)
    assert decide(near, "first", 0.5)["verdict"] == "none"  # flat under the mask: nothing to be alike
    same = decide(same, "first", 0.5)
    # one pixel of four is white: variance 3 x 3/16
    assert same["correlation_distance"] == pytest.approx(0.0027 / (2 * 9 / 16 + 0.0027), rel=1e-4)
    assert (same["distance"], same["verdict"]) == (0, "local")
    assert "distance_first" not in same
    assert (own["own"], own["rank"], own["image_index"]) == (True, -1, 2)
    assert "s" not in own and own["unreadable"] == "8.jpg: gone"
    for sscd in (0.1, 0.9):  # its pixels are gone: it decides nothing, however alike
        assert decide({**own, "sscd": sscd}, "first", 0.5)["verdict"] == "no_reference"
    (copied,) = match_image(image, 0, masks, [Neighbour(7, 0.6, 0)], None, stored, facts)  # type: ignore[arg-type]
    assert (decide(copied, "energy", 0.5)["verdict"], copied["s"], copied["ls_norm"]) == ("global", 0, 0)
    assert copied["ls_corr"] == 0


def test_sscd_is_the_larger_of_whole_and_training_crop(tmp_path: object) -> None:
    """A 3:1 picture, whose middle the model reproduces: the whole alone would hardly look like it."""
    rows = pq.read_table(testbed.PICTURES).slice(0, 30).to_pylist()
    panels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(panels[:3])).save(buffer, "PNG")
    rows = [{**rows[0], "key": "wide", "image": {"bytes": buffer.getvalue(), "path": None}}, *rows[3:]]
    pq.write_table(pa.Table.from_pylist(rows), f"{tmp_path}/wide.parquet")
    build_index(IndexConfig(images=(f"{tmp_path}/wide.parquet",), output=f"{tmp_path}/ix", sscd="testbed"))
    wide = Index.open(f"{tmp_path}/ix")
    descriptor = wide.load_descriptor()
    with threads() as pool:
        crops = TrainingCrops(References(wide, (64, 64)), descriptor, pool)
        crops.describe([0, 1])
        vector = descriptor([panels[1]]).numpy()[0]
        whole = float(wide.vectors([0])[0] @ vector)
        assert whole < 0.5 and crops.larger(vector, 0, whole) == pytest.approx(1, abs=1e-3)
        assert crops.vector(1) is None  # nothing was cut off a square
        other = descriptor([panels[5]]).numpy()[0]
        assert crops.larger(other, 1, 0.25) == 0.25


# --- the null, on real pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(testbed_index: str) -> Index:
    return Index.open(testbed_index)


def some_masks(count: int = 40) -> np.ndarray:
    """Smooth random masks, 64 x 64."""
    rng = np.random.default_rng(3)
    return masks_at(rng.random((count, 4, 4)).astype(np.float32), (64, 64))


def null_of(index: Index, fpr: float, sample: int, num_images: int = 1) -> Null:
    with threads() as pool:
        crops = TrainingCrops(References(index, (64, 64)), index.load_descriptor(), pool)
        return pictures_null(draw_pictures(index, 11, sample, 0), crops, some_masks(), fpr, num_images)


@pytest.mark.simulation
def test_planted_near_duplicates_do_not_move_the_threshold(index: Index, tmp_path: object) -> None:
    before = null_of(index, 0.05, 400)
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
    after = null_of(more, 0.05, 400)
    assert len(more) == len(index) + 200
    assert after.near_duplicates > before.near_duplicates
    assert len(after) == len(before) == 400
    assert after.threshold == pytest.approx(before.threshold, rel=0.02)


@pytest.mark.simulation
def test_the_rate_holds_on_pictures_that_were_not_sampled(index: Index) -> None:
    """Of m fresh pictures BetaBinomial(m, k, n + 1 - k) lie below the threshold of n: exact, both sides.

    With a rate of twice what was asked for this fails with a chance of 9 in 10, with half of it of 7 in 10.
    """
    everything, null = null_of(index, 0.1, 10_000), null_of(index, 0.1, 300)
    fresh = np.setdiff1d(everything.statistics, null.statistics)
    assert len(fresh) > 300
    below = int((null.statistics < null.threshold).sum()) + 1
    promised = betabinom(len(fresh), below, len(null) + 1 - below)
    assert promised.ppf(0.025) <= (fresh < null.threshold).sum() <= promised.ppf(0.975)
    assert null.low <= null.threshold <= null.high
    for factor, power in ((2.0, 0.9), (0.5, 0.7)):
        other = betabinom(len(fresh), factor * below, len(null) + 1 - factor * below)
        caught = 1 - other.cdf(promised.ppf(0.975)) + other.cdf(promised.ppf(0.025) - 1)
        assert caught > power


@pytest.mark.simulation
@pytest.mark.parametrize(("sample", "fpr", "below"), [(400, 0.05, 19), (40, 0.05, 1), (99, 0.01, 0)])
def test_what_is_below_the_threshold_has_a_p_value_of_the_rate_at_most(
    index: Index, sample: int, fpr: float, below: int
) -> None:
    """19 statistics of 400 below: the next one would have p = 21 / 401."""
    null = null_of(index, fpr, sample)
    assert int((null.statistics < null.threshold).sum()) == below
    just_below = float(np.nextafter(null.threshold, 0))
    assert null.p_value(just_below) <= fpr + 1e-12 < null.p_value(null.threshold + 1e-9) + 1 / (sample + 1)  # type: ignore[operator]


@pytest.mark.simulation
def test_sixteen_images_a_candidate_have_a_finite_threshold_or_a_line_that_says_what_they_need(index: Index) -> None:
    few, enough = draw_pictures(index, 11, 400, 0), draw_pictures(index, 11, sample_needed(0.05, 16), 0)
    with pytest.raises(
        AuditError, match=r"400 different pictures cannot tell .* 0.01 with 16 images .* 1,592 are needed"
    ):
        check_pictures(few, index, 0.01, 16)
    check_pictures(enough, index, 0.05, 16)
    one, sixteen = null_of(index, 0.05, 400), null_of(index, 0.05, len(enough), 16)
    assert len(enough) == 312 and np.isfinite(sixteen.threshold) and sixteen.threshold < one.threshold


def test_what_could_not_be_compared_leaves_no_none() -> None:
    """A copy is one whatever else is missing; that there is none cannot be said then."""
    assert (
        best_verdict(["none", "no_reference"]) == best_verdict(["no_reference"]) == best_verdict([]) == "no_reference"
    )
    assert best_verdict(["none", "no_reference", "local"]) == "local"
    assert best_verdict(["none", "none"]) == "none"
