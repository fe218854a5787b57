"""A long scan starts with one batch against the plain formula, and does not start where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.formulas
from audit.run.read import read_scores
from audit.run.run import Run
from tests.command import be_audit
from tests.conftest import some_captions
from tests.tiny_transformers import save_if, save_pixart, save_sana, save_sd3

pytestmark = pytest.mark.sampling


@pytest.fixture()
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("audit.scores.scan.LONG", 3)  # these are long scans
    pq.write_table(pa.table({"TEXT": some_captions(6)}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


@pytest.mark.parametrize("flags", [[], ["--num-noises", 2, "--dtype", "bfloat16"]])
def test_a_scorer_that_agrees_scans(tmp_path: Path, captions: Path, sd1: str, flags: list[object]) -> None:
    found = be_audit("scan", captions, "-o", tmp_path / "run", "--model", sd1, *flags)
    assert found.code == 0, found
    assert read_scores(Run.open(str(tmp_path / "run")))["status"].to_pylist() == ["ok"] * 6


@pytest.mark.parametrize("save", [save_pixart, save_sd3, save_sana, save_if])
def test_a_model_without_masks_is_checked_too(
    save: Callable[[Path], Path], tmp_path: Path, captions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save(tmp_path / "model"))
    scan = ("scan", captions, "-o", tmp_path / "run", "--model", model)
    with monkeypatch.context() as patch:
        right = pipelines.formulas.magnitude
        patch.setattr("pipelines.formulas.magnitude", lambda energy: 1.01 * right(energy))
        found = be_audit(*scan)
        assert found.code != 0 and "off by 0.01" in found.err
    found = be_audit(*scan)
    assert found.code == 0, found


def test_a_scorer_that_is_wrong_does_not(
    tmp_path: Path, captions: Path, sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipelines.formulas.magnitude
    monkeypatch.setattr("pipelines.formulas.magnitude", lambda energy: 1.01 * right(energy))
    scan = ("scan", captions, "-o", tmp_path / "run", "--model", sd1)
    found = be_audit(*scan)
    assert found.code != 0 and "--self-check: magnitudes of 3 captions" in found.err and "off by 0.01" in found.err
    assert be_audit(*scan, "--no-self-check").code == 0
