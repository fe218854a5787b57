"""`make tables` in its quick form: everything is written, and the same seeds give the same tables."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.tables import write_tables

MEASURED = {"milliseconds"}  # the only column that may differ


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in sorted(folder.glob("tables/*.csv")):
        with path.open() as file:
            found[path.stem] = [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]
    return found


@pytest.mark.timeout(600)
def test_tables_are_written_whole_and_again_the_same(tmp_path: Path) -> None:
    work = tmp_path / "work"
    page = write_tables(tmp_path / "first", work, quick=True).read_text()
    for kept in (*work.glob("*/whole-*.npz"), *work.glob("*/detectors-*.npz"), *work.glob("*/seconds.json")):
        kept.unlink()  # as if it had been stopped before these were done
    write_tables(tmp_path / "again", work, quick=True)
    first = tables(tmp_path / "first")
    assert first == tables(tmp_path / "again")

    of_papers = {"published_detection", "published_masks"}
    assert set(first) == {"detection", "evaluation", "masks", "detectors", "mask_question"} | of_papers
    assert page.count("On Stable Diffusion, as published") == 2
    both = {
        ("design label", "local"),
        ("design label", "global"),
        ("measured copying", "local"),
        ("measured copying", "global"),
    }
    for name in ("detection", "evaluation", "detectors"):
        assert {(row["truth"], row["type"]) for row in first[name]} == both
    assert {row["score"] for row in first["detectors"]} >= {"webster", "attention_entropy", "cosine", "anisotropy"}
    assert {row["evaluations"] for row in first["detectors"] if row["score"] in ("ld_energy", "anisotropy")} == {
        "1",
        "2",
    }
    assert {row["token"] for row in first["mask_question"]} >= {"EOS", "1 - BOS", "EOS and padding", "power 1"}
    assert len({row["layers"] for row in first["mask_question"]}) == 12 + 3  # the paper's two, 11 alone, 3 smoothings

    links = re.findall(r"\]\((tables/[^)]+)\)", page)
    assert {Path(link).stem for link in links} == {*first, "attention_per_step"}
    for link in links:
        assert (tmp_path / "first" / link).exists()
    for picture in (tmp_path / "first/tables").glob("*.png"):
        assert len(set(Image.open(picture).convert("L").tobytes())) > 20
    assert "not Stable Diffusion" in page and "--quick" in page and "nan" not in page
