"""`make tables` in its quick form: everything is written, the same seeds give the same tables; figures over noises."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.tables import PAGES, first_step_page
from tests.benchmarks.tables_noises import excess, figure
from tests.benchmarks.tables_regions import otsu


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in sorted(folder.glob("tables/*.csv")):
        with path.open() as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


@pytest.mark.timeout(600)
def test_tables_are_written_whole_and_again_the_same(tmp_path: Path) -> None:
    work, once, again = tmp_path / "work", tmp_path / "once", tmp_path / "again"
    pages = [write(once, work, quick=True).read_text() for write in PAGES.values()]
    for kept in (*work.glob("*/difference-*.npz"), *work.glob("*/columns-*.npz")):
        kept.unlink()  # as if it had been stopped before these were done
    first_step_page(again, work, quick=True)
    found = tables(once)
    assert tables(again) == {name: found[name] for name in ("samples", "noises", "regions", "detectors")}

    of_papers = {"chen_detection", "chen_evaluation", "detection", "masks"}
    ours = {*tables(again), "samples_trajectories", "detection", "evaluation", "masks", "mask_question"}
    assert set(found) == ours | {f"published_{name}" for name in of_papers}
    published = ("as published for Stable Diffusion 1.4", "On Stable Diffusion, as published")
    assert [pages[1].count(words) for words in published] == [2, 2]
    for name in ("noises", "detection", "evaluation", "detectors"):
        assert {row["type"] for row in found[name]} == {"local", "global"}
        assert all(float(row["auc_least"]) <= float(row["auc"]) <= float(row["auc_most"]) for row in found[name])
    assert {row["truth"] for row in found["detectors"]} == {"design label", "measured copying"}
    of_noises = {(row["noises"], row["over_noises"]) for row in found["noises"]}
    assert of_noises == {("1", "mean"), ("2", "mean"), ("2", "max")}
    baselines = {"webster", "attention_entropy", "cosine", "anisotropy"}
    assert {row["score"] for row in found["detectors"]} >= baselines | {"excess", "excess_pca"}
    costs = {row["score"]: row["evaluations"] for row in found["detectors"]}
    assert costs["ld_energy"] == "1" and costs["anisotropy"] == "2"
    assert {row["token"] for row in found["mask_question"]} >= {"EOS", "1 - BOS", "EOS and padding", "power 1"}
    assert len({row["layers"] for row in found["mask_question"]}) == 12 + 3  # the paper's two, 11 alone, 3 smoothings

    links = re.findall(r"\]\((tables/[^)]+)\)", "".join(pages))
    assert {Path(link).stem for link in links} == {*found, "attention_per_step"}
    for link in links:
        assert (once / link).exists()
    for picture in (once / "tables").glob("*.png"):
        assert len(set(Image.open(picture).convert("L").tobytes())) > 20
    for page in pages:
        assert "not Stable Diffusion" in page and "--quick" in page and "nan" not in page


def test_a_figure_is_the_mean_over_noises_and_its_interval_holds_them_all() -> None:
    truth, clusters = np.repeat([True, False], 20), np.arange(40)
    good, bad = np.where(truth, 2.0, 1.0), np.where(truth, 1.0, 2.0)
    values = np.stack([good, bad])  # one noise tells all apart, the other has it all the wrong way round
    found = figure("score", "local", values, truth, values, clusters)
    assert (found["auc"], found["auc_least"], found["auc_most"]) == (0.5, 0.0, 1.0)
    assert (found["auc_low"], found["auc_high"]) == (0.0, 1.0)
    assert (found["gain"], found["gain_low"], found["gain_high"]) == (0.0, 0.0, 0.0)  # under the same noise
    together = figure("score", "local", values, truth, values, clusters, draws=2)
    assert (together["auc"], together["noises"]) == (0.5, 2)  # their mean tells nothing


def test_excess_is_the_largest_deviation_from_what_is_usual() -> None:
    usual = np.exp(np.linspace(0, 1, 101))[:, None, None] * np.ones((1, 4, 4))
    maps, null = np.full((1, 1, 4, 4), np.e**2, np.float32), usual[None].astype(np.float32)
    # logarithms 0 to 1: median 0.5, 84 % quantile 0.84; this one lies 1.5 above the median
    assert excess(maps, null)[0, -1] == pytest.approx(1.5 / 0.34, rel=1e-4)


def test_otsu_cuts_between_two_levels() -> None:
    rows = np.array([[0.1, 0.2, 0.9, 1.0], [5.0, 5.0, 5.0, 9.0]])
    assert otsu(rows).tolist() == [0.2, 5.0]
