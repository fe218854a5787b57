"""The Ray engine on a real local cluster: the same rows and scores, a killed actor replaced."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError, Drained
from audit.base.fingerprint import digest
from audit.base.stopping import Stop
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import SCAN, Stage, run_stage
from audit.scores.scan import ScanConfig, scan
from tests.tiny import save_model

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("ray")
    captions = [f"a picture of {number} things" for number in range(60)]
    pq.write_table(pa.table({"TEXT": captions}), folder / "captions.parquet")
    return str(folder / "captions.parquet"), str(save_model("sd1", folder / "model"))


def config(inputs: tuple[str, str], output: Path, engine: str) -> ScanConfig:
    return ScanConfig(
        captions=(inputs[0],),
        model=inputs[1],
        output=str(output),
        engine=engine,
        workers=2,
        rows_per_shard=5,
        device="cpu",
    )


def test_ray_gives_the_same_run_and_survives_a_killed_actor(inputs: tuple[str, str], tmp_path: Path) -> None:
    killed: list[int] = []
    finished = threading.Event()

    def kill_one() -> None:
        """SIGKILL the first actor once a shard is committed."""
        commits = tmp_path / "ray/_commits/scan"
        while not finished.is_set():
            if commits.is_dir() and any(commits.iterdir()):
                for process in psutil.Process().children(recursive=True):
                    if "ShardActor" in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.02)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    done = scan(config(inputs, tmp_path / "ray", "ray"))
    finished.set()
    watcher.join()
    assert killed, "no actor was killed: the test shows nothing"
    assert (done.exit_code, done.complete) == (0, True)
    assert scan(config(inputs, tmp_path / "ray", "ray")).committed_now == 0
    scan(config(inputs, tmp_path / "here", "local"))
    by_ray = read_scores(Run.open(str(tmp_path / "ray"))).to_pandas()
    here = read_scores(Run.open(str(tmp_path / "here"))).to_pandas()
    assert by_ray.row_id.tolist() == here.row_id.tolist()
    assert by_ray.caption.tolist() == here.caption.tolist()
    np.testing.assert_allclose(by_ray.ld, here.ld, rtol=1e-4)
    np.testing.assert_allclose(by_ray.ld_energy, here.ld_energy, rtol=1e-4)


def test_bad_input_found_by_an_actor_ends_the_job(inputs: tuple[str, str], tmp_path: Path) -> None:
    """A node with other weights: said at once, in one line, and no shard's fault."""
    mine = config(inputs, tmp_path / "run", "ray")
    stop = Stop()
    stop.requested = True  # planned, not begun
    with pytest.raises(Drained):
        scan(mine, stop)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    facts["fingerprint"]["model"]["weights_sha256"] = "0" * 64
    facts["digest"] = digest(facts["fingerprint"])
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    stage = Stage.open(Run.open(str(tmp_path / "run")), SCAN)
    with pytest.raises(AuditError, match="other weights than the run was begun with"):
        run_stage(stage, [0, 1, 2], mine, None)
    assert stage.ledger.tried() == set()
