"""Training pictures that cannot be read any more decide nothing; they are compared once they are back."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from audit.index import IndexConfig, build_index
from audit.run.read import read_stage
from audit.run.run import Run
from audit.scores.scan import ScanConfig, scan
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import confirm

pytestmark = pytest.mark.sampling


def test_a_picture_that_is_gone_decides_nothing_until_it_is_back(tmp_path: Path) -> None:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[(table.copy_error < 0.15) & (table.label == "global")].sort_values("copy_error").head(2)
    pq.write_table(pa.Table.from_pylist(copied.to_dict("records")), tmp_path / "captions.parquet")
    run = str(tmp_path / "run")
    scan(ScanConfig((str(tmp_path / "captions.parquet"),), run, model="testbed", steps=5, rank=0, world_size=1))
    (tmp_path / "pictures").mkdir()
    for row in pq.read_table(testbed.PICTURES).to_pylist():
        if row["TEXT"] in set(copied.TEXT) or row["key"].endswith("7"):
            (tmp_path / "pictures" / f"{row['key']}.png").write_bytes(row["image"]["bytes"])
            (tmp_path / "pictures" / f"{row['key']}.txt").write_text(row["TEXT"])
    build_index(IndexConfig((str(tmp_path / "pictures"),), str(tmp_path / "index"), sscd="testbed"))
    config = ConfirmConfig(run, index=str(tmp_path / "index"), ls_threshold=1e-6, top_k=2)
    # 1. the mount is dead
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    dead = confirm(config)
    assert dead.verdicts == {"global": 0, "local": 0, "none": 0, "no_reference": 2} and dead.exit_code == 3
    assert f"{dead.unreadable} comparisons" in dead.lines()[-1] and "decided nothing (no_reference)" in dead.lines()[-1]
    assert "No such file" in dead.lines()[-1] and "give the command again when they are back" in dead.lines()[-1]
    rows = read_stage(Run.open(run), "confirm").to_pylist()
    assert all(
        match["verdict"] == "no_reference" and "No such file" in match["unreadable"] for match in rows[0]["matches"]
    )
    # 2. as long as it is, nothing is done again
    assert confirm(config).committed_now == 0
    # 3. it is back
    (tmp_path / "elsewhere").rename(tmp_path / "pictures")
    back = confirm(config)
    assert back.verdicts["global"] == 2 and back.unreadable == 0 and back.exit_code == 0
    assert "2 of 2 candidates have their own picture in the index" in back.lines()[-1]
    assert confirm(config).committed_now == 0
