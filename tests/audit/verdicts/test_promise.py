"""What the local verdict promises, kept on the testbed: the false rate, exactly, on both sides, and the copies found.

Sampling has few steps: enough for copies of the strongest templates, and a promise on clean captions does not rest on
how good their images are. bench_confirm.py takes all captions and 50 steps.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import betabinom

from audit import testbed
from audit.run.read import read_stage
from audit.run.run import Run
from audit.scores.scan import ScanConfig, scan
from audit.statistics.thresholds import rows_allowed
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import confirm

FPR, CLEAN, JUDGED = 0.3, 59, 80
"""Chosen for the power to fail: of 80 captions 24 are expected; fewer than 13 or more than 37 fail."""


def interval(rate: float) -> tuple[float, float]:
    """Central 95 % of the alarms among JUDGED where the threshold comes from CLEAN: a beta-binomial count, exactly."""
    below = (CLEAN + 1) * rate
    count = betabinom(JUDGED, below, CLEAN + 1 - below)
    return count.ppf(0.025), count.ppf(0.975)


def test_this_test_can_fail() -> None:
    """A rule with twice the rate it promises, or a quarter of it, fails with a chance of nine in ten."""
    low, high = interval(FPR)
    assert (low, high) == (13, 37)
    for factor in (2, 0.25):
        below = (CLEAN + 1) * FPR * factor
        other = betabinom(JUDGED, below, CLEAN + 1 - below)
        assert other.cdf(low - 1) + 1 - other.cdf(high) > 0.9


@pytest.mark.sampling
@pytest.mark.timeout(1200)
def test_false_alarms_and_copies_found(tmp_path: Path, testbed_index: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT").sort_values("copy_error", kind="stable")
    copied = table[table.label == "local"].drop_duplicates("cluster").head(10)
    unseen = table[table.cluster.str.startswith("unseen")].sort_values("TEXT", kind="stable")
    unseen = unseen.sample(frac=1, random_state=0)  # in alphabetical order, titles would be judged by descriptions
    clean, judged = unseen[:CLEAN], unseen[CLEAN : CLEAN + JUDGED]
    rows = [*copied.to_dict("records"), *judged.to_dict("records")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "captions.parquet")
    pq.write_table(pa.table({"caption": clean.TEXT.tolist()}), tmp_path / "clean.parquet")
    run = str(tmp_path / "run")
    captions = (str(tmp_path / "captions.parquet"),)
    scan(ScanConfig(captions=captions, output=run, model="testbed", steps=4, device="cpu", second_look=0.0))
    config = ConfirmConfig(run=run, index=testbed_index, top_fraction=1.0, match_fpr=FPR, device="cpu")
    confirm(ConfirmConfig(**{**vars(config), "clean": str(tmp_path / "clean.parquet")}))
    found = read_stage(Run.open(run), "confirm")
    assert found is not None
    verdicts = dict(zip(found["caption"].to_pylist(), found["verdict"].to_pylist(), strict=True))
    alarms = sum(verdicts[caption] == "local" for caption in judged.TEXT)
    caught = sum(verdicts[caption] in ("local", "global") for caption in copied.TEXT)
    low, high = interval((rows_allowed(CLEAN, FPR) + 1) / (CLEAN + 1))
    with capsys.disabled():
        print(f"\nlocal verdicts on never seen captions: {alarms} of {len(judged)}, {low:.0f} to {high:.0f} promised")
        print(f"copied local captions found: {caught} of {len(copied)}")
    assert low <= alarms <= high
    assert caught >= 0.9 * len(copied)
