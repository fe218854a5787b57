"""What the local verdict promises, kept on the testbed: few false alarms on unseen captions, most copies found."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from audit.cli.demo import COPIED
from audit.run.read import read_stage
from audit.run.run import Run
from audit.scores.scan import ScanConfig, scan
from audit.statistics.intervals import share_interval
from audit.verdicts.confirm import ConfirmConfig, confirm

FPR = 0.05


@pytest.mark.sampling
@pytest.mark.timeout(1200)
def test_false_alarms_and_copies_found(testbed_index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two captions of every copied template and 60 never seen; the benchmark (bench_confirm.py) takes all of them."""
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[(table.label == "local") & (table.copy_error < COPIED)].groupby("cluster").head(2)
    unseen = table[table.cluster.str.startswith("unseen")].head(60)
    rows = [*copied.to_dict("records"), *unseen.to_dict("records")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "captions.parquet")
    run = str(tmp_path / "run")
    scan(ScanConfig(captions=(str(tmp_path / "captions.parquet"),), output=run, model="testbed", device="cpu"))
    confirm(ConfirmConfig(run=run, index=testbed_index, top_fraction=1.0, match_fpr=FPR, device="cpu"))
    found = read_stage(Run.open(run), "confirm")
    assert found is not None
    verdicts = dict(zip(found["caption"].to_pylist(), found["verdict"].to_pylist(), strict=True))
    alarms = sum(verdicts[caption] == "local" for caption in unseen.TEXT)
    caught = sum(verdicts[caption] in ("local", "global") for caption in copied.TEXT)
    low, high = share_interval(alarms, len(unseen))
    with capsys.disabled():
        print(f"\nlocal verdicts on never seen captions: {alarms} of {len(unseen)} ({low:.1%} to {high:.1%})")
        print(f"copied local captions found: {caught} of {len(copied)}")
    assert low <= FPR
    assert caught >= 0.85 * len(copied)
