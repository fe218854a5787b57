"""Every query on a fresh run of the testbed, made as the demo makes it (fewer steps), against the same pandas."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from audit.run.read import read_stage
from audit.run.run import Run
from audit.scores.scan import ScanConfig, scan
from audit.verdicts.confirm import ConfirmConfig, confirm
from tests.audit.reports.test_sql import (  # noqa: F401
    frame_of,
    test_domains,
    test_duplicates,
    test_flagged,
    test_histogram,
    test_templates,
    test_throughput,
    test_verdicts,
)
from tests.conftest import once

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def run(shared: Path, testbed_index: str) -> Run:
    return Run.open(once(shared / "sql-demo", lambda folder: _confirmed(folder, testbed_index)))


def _confirmed(folder: Path, testbed_index: str) -> str:
    """Of the first captions and of some that are repeated."""
    table = pq.read_table(testbed.CAPTIONS).to_pandas()
    repeated = table.TEXT.value_counts().index[:8]
    table[(table.index < 100) | table.TEXT.isin(repeated)].to_parquet(folder / "captions.parquet", index=False)
    scan(
        ScanConfig(
            captions=(str(folder / "captions.parquet"),),
            output=str(folder / "run"),
            model="testbed",
            steps=4,
            rows_per_shard=32,
            refine=0.02,
            second_look_noises=2,
            device="cpu",
        )
    )
    confirm(ConfirmConfig(run=str(folder / "run"), index=testbed_index, top_k=8, device="cpu"))
    return str(folder / "run")


@pytest.fixture(scope="module")
def scores(run: Run) -> pd.DataFrame:
    """From the raw files by pandas alone: of every row the last look at its first occurrence."""
    files = sorted(Path(run.url, "scores").rglob("*.arrow"))
    raw = pd.concat(
        pa.ipc.open_file(pa.memory_map(str(file))).read_all().drop(["mask", "energy_mask"]).to_pandas()
        for file in files
    )
    raw = raw.set_index("row_id", drop=False)
    looks = sorted(Path(run.url, "second_look").rglob("*.arrow"))
    later = pd.concat(pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_pandas() for file in looks)
    names = ["num_noises", "magnitude", "ld", "ld_energy", "excess", "excess_pca"]
    assert len(later) > 10
    raw.loc[later["row_id"], names] = later[names].to_numpy()
    frame = raw.loc[raw["duplicate_of"].fillna(raw["row_id"]).astype("int64")].set_index(raw.index)
    frame["row_id"], frame["duplicate_of"], frame["url"] = raw["row_id"], raw["duplicate_of"], raw["URL"]
    return frame.rename_axis(index=None)


@pytest.fixture(scope="module")
def confirmed(run: Run) -> pd.DataFrame:
    table = read_stage(run, "confirm")
    assert table is not None
    frame = pd.DataFrame(table.drop_columns(["matches"]).to_pylist())
    return frame.set_index("row_id", drop=False).rename_axis(index=None)


def test_errors(run: Run) -> None:
    assert frame_of("errors", run).empty
