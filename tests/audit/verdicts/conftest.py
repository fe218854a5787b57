"""A small scanned run of the testbed with captions of every kind, and how to confirm it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from audit.scores.scan import ScanConfig, scan
from audit.verdicts.candidates import ConfirmConfig
from tests.conftest import once

STEPS = 4  # enough for the strongest copies


@pytest.fixture(scope="session")
def work(shared: Path, testbed_index: str) -> Path:
    """captions.parquet (24 captions), be-audit-run scanned, be-audit-index built. Read it only."""
    return once(shared / "confirm", lambda folder: _scanned(folder, testbed_index))


def _scanned(folder: Path, testbed_index: str) -> Path:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[table.copy_error < 0.15].sort_values("copy_error", kind="stable")
    chosen = [
        copied[copied.label == "global"].head(6),
        copied[copied.label == "local"].drop_duplicates("cluster").head(6),
        table[table.cluster.str.startswith("unseen")].head(12),
    ]
    rows = [row for part in chosen for row in part.to_dict("records")]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), folder / "captions.parquet")
    scan(config_at(folder))
    (folder / "be-audit-index").symlink_to(testbed_index)
    return folder


def config_at(folder: Path, **more: object) -> ScanConfig:
    base = ScanConfig(
        captions=(str(folder / "captions.parquet"),),
        output=str(folder / "be-audit-run"),
        model="testbed",
        steps=STEPS,
        rows_per_shard=7,
        device="cpu",
    )
    return replace(base, **more)  # type: ignore[arg-type]


@pytest.fixture()
def run(work: Path, tmp_path: Path) -> ConfirmConfig:
    """A fresh copy of the scanned run, and how to confirm all of it."""
    return confirm_at(work, work / "be-audit-run", tmp_path / "run")


def confirm_at(work: Path, run: Path, copy: Path) -> ConfirmConfig:
    """How to confirm all of a copy of a run."""
    return ConfirmConfig(
        run=str(shutil.copytree(run, copy)),
        index=str(work / "be-audit-index"),
        top_fraction=1.0,
        match_fpr=0.05,
        null_pictures=100,
    )
