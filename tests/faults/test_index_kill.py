"""An index build that is killed again and again ends with the same index as one that was left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from audit import testbed
from audit.index import Index, IndexConfig, build_index, verify_index

BUILD = """
import sys
from audit.index import IndexConfig, build_index
build_index(IndexConfig(images=(sys.argv[1],), output=sys.argv[2], sscd="testbed", rows_per_part=20, type="HNSW16"))
"""


def kill_when(pictures: Path, output: Path, commits: int) -> None:
    """Start a build and SIGKILL it as soon as so many parts are committed."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(pictures), str(output)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(output.glob("_commits/embed/*.json"))) < commits:
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_builds_go_on_where_they_were(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures.parquet"
    pq.write_table(pq.read_table(testbed.PICTURES).slice(0, 400), pictures)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for commits in (1, 6, 13, 20):  # the last one dies between its last part and its search index
        kill_when(pictures, killed, commits)
        torn = [path for path in killed.glob("_commits/embed/*.json") if path.stat().st_size == 0]
        assert torn == [] and not (killed / "index_info.json").exists()
    config = IndexConfig(images=(str(pictures),), output=str(killed), sscd="testbed", rows_per_part=20, type="HNSW16")
    summary = build_index(config)
    assert (summary.parts, summary.resumed, summary.ok) == (20, 20, 400)
    build_index(IndexConfig(**{**vars(config), "output": str(whole)}))
    assert verify_index(str(killed), deep=True) == []
    one, other = Index.open(str(killed)), Index.open(str(whole))
    assert one.fingerprint == other.fingerprint and np.array_equal(one.ids(), other.ids())
    np.testing.assert_allclose(one.vectors(one.ids()), other.vectors(other.ids()), atol=1e-3)
    assert one.facts(one.ids()).equals(other.facts(other.ids()))
    assert [path.name for path in killed.iterdir() if path.name.startswith(".")] == []
