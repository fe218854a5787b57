"""Choosing rows part by part: the same ones as from the whole table, whatever the parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit.base.errors import AuditError
from audit.reports.flagged import find_flagged
from audit.run import read, select
from audit.run.run import Run
from audit.run.select import best_scores
from tests.fabricate import make_run

ROWS = 240


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Scores of one decimal, so that many are equal; a fifth of the captions repeat, some failed."""
    captions = [f"caption {row if row % 5 else row // 2}" for row in range(ROWS)]
    scores = np.random.default_rng(3).gamma(4, 0.3, ROWS).round(1)
    return make_run(
        tmp_path_factory.mktemp("select"), captions, scores=scores, failed=range(7, ROWS, 40), rows_per_shard=16
    )


@pytest.fixture(scope="module")
def ranking(run: Run) -> pd.DataFrame:
    """The whole table, sorted by pandas."""
    table = read.read_scores(run, ["row_id", "status", "duplicate_of", "ld_energy"]).to_pandas()
    own = table[(table.status == "ok") & table.duplicate_of.isna()]
    return own.sort_values(["ld_energy", "row_id"], ascending=[False, True])


@pytest.mark.parametrize("rows", [1, 20, 1000])
@pytest.mark.parametrize("wanted", [{"top_k": 1}, {"top_k": 30}, {"top_k": 10**6}, {"fraction": 0.1}, {"fraction": 1.0},
                                    {"threshold": 1.2}, {"top_k": 9, "fraction": 0.5, "threshold": 0.5}])  # fmt: skip
def test_the_best_rows_do_not_depend_on_the_parts(
    run: Run, ranking: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, rows: int, wanted: dict[str, Any]
) -> None:
    for module in (read, select):
        monkeypatch.setattr(module, "PART_ROWS", rows)
    count = len(ranking)
    if "threshold" in wanted:
        count = int((ranking.ld_energy > np.float32(wanted["threshold"])).sum())
    if "fraction" in wanted:
        count = min(count, int(np.ceil(wanted["fraction"] * len(ranking))))
    expected = ranking.row_id[: min(count, wanted.get("top_k", count))].tolist()
    assert best_scores(run, "ld_energy", **wanted)["row_id"].to_pylist() == expected
    assert read.read_distinct(run, ["row_id"])["row_id"].to_pylist() == sorted(ranking.row_id)


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("threshold, top_k", [(None, 12), (None, None), (1.2, None), (1.2, 3), (99.0, None)])
def test_a_report_lists_the_same_rows(
    run: Run,
    ranking: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    threshold: float | None,
    top_k: int | None,
) -> None:
    for module in (read, select):
        monkeypatch.setattr(module, "PART_ROWS", rows)
    above = len(ranking) if threshold is None else int((ranking.ld_energy > np.float32(threshold)).sum())
    if threshold is None and top_k is None:
        above = int(np.ceil(0.1 * len(ranking)))
    taken = min(above, top_k or above)
    found = find_flagged(run, "ld_energy", threshold, top_k)
    assert found.table["row_id"].to_pylist() == ranking.row_id[:taken].tolist()
    assert (found.above, found.taken, found.counts["distinct"]) == (above, taken, len(ranking))
    assert sorted(found.scores) == sorted(ranking.ld_energy)


def test_a_column_without_scores_is_one_line(run: Run) -> None:
    with pytest.raises(AuditError, match="no scores in this column"):
        best_scores(run, "cosine_low", fraction=0.1)
    with pytest.raises(AuditError, match="no scores in this column"):
        find_flagged(run, "cosine_low", None, None)
