"""The Ray engine on real clusters: the same rows and scores; actors, a node, the head and the driver killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from ray.cluster_utils import Cluster

from audit.base.errors import AuditError, Drained
from audit.base.fingerprint import digest
from audit.base.stopping import Stop
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import SCAN, Stage, run_stage
from audit.scores.scan import ScanConfig, scan
from tests.command import start
from tests.tiny import save_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _one_at_a_time(shared: Path) -> Iterator[None]:
    """Two clusters on two busy cores keep each other waiting for minutes."""
    with pytest.MonkeyPatch.context() as patch, FileLock(shared / "ray.lock"):
        patch.setenv("RAY_worker_niceness", "0")  # else 15: a machine busy with other tests never comes to them
        yield


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
        second_look=0.0,  # each stage starts its own actors
        device="cpu",
    )


def shard_actors() -> list[psutil.Process]:
    """Actors of clusters that this process began."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ShardActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def dead_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a cluster that was killed leaves behind on a machine: Ray would join it where no address is given."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets below it bear no long name
        Path(folder, "ray").mkdir()
        Path(folder, "ray/ray_current_cluster").write_text("127.0.0.1:1")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.mark.usefixtures("dead_cluster")
def test_ray_gives_the_same_run_and_survives_a_killed_actor(inputs: tuple[str, str], tmp_path: Path) -> None:
    killed: list[int] = []
    finished = threading.Event()

    def kill_one() -> None:
        """SIGKILL the first actor once a shard is committed."""
        commits = tmp_path / "ray/_commits/scan"
        while not finished.is_set():
            if commits.is_dir() and any(commits.iterdir()):
                for process in shard_actors():
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
    scan(replace(config(inputs, tmp_path / "here", "local"), workers=1))
    by_ray = read_scores(Run.open(str(tmp_path / "ray"))).to_pandas()
    here = read_scores(Run.open(str(tmp_path / "here"))).to_pandas()
    assert by_ray.row_id.tolist() == here.row_id.tolist()
    assert by_ray.caption.tolist() == here.caption.tolist()
    np.testing.assert_allclose(by_ray.ld, here.ld, rtol=1e-4)
    np.testing.assert_allclose(by_ray.ld_energy, here.ld_energy, rtol=1e-4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with room for one actor, until the last test kills it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_bad_input_found_by_an_actor_ends_the_job(inputs: tuple[str, str], cluster: Cluster, tmp_path: Path) -> None:
    """A node with other weights: said at once, in one line, and no shard's fault."""
    mine = replace(config(inputs, tmp_path / "run", "ray"), ray_address=cluster.address)
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


def after_a_commit(run: Path, strike: Callable[[], object]) -> threading.Thread:
    """Do something once one more shard is committed than now."""
    commits = run / "_commits/scan"
    before = len(list(commits.glob("*.json")))

    def watch() -> None:
        while len(list(commits.glob("*.json"))) <= before:
            time.sleep(0.05)
        strike()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def check_rows(run: Path) -> None:
    """Every caption of the inputs is there once."""
    table = read_scores(Run.open(str(run))).to_pandas()
    assert table.row_id.is_unique and set(table.status) == {"ok"}
    assert sorted(table.caption) == sorted(f"a picture of {number} things" for number in range(60))


def test_a_node_dies(
    inputs: tuple[str, str], cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it had in hand is done by the other node; committed shards move the bar."""
    node, run = cluster.add_node(num_cpus=1), tmp_path / "run"
    watcher = after_a_commit(run, lambda: cluster.remove_node(node, allow_graceful=False))
    done = scan(replace(config(inputs, run, "ray"), ray_address=cluster.address))
    watcher.join()
    assert (done.exit_code, done.complete) == (0, True)
    assert "scan: 60/60 captions" in capsys.readouterr().err
    check_rows(run)


def test_the_driver_is_killed_and_then_the_head(
    inputs: tuple[str, str],
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command three times, the last without a cluster."""
    monkeypatch.setattr("audit.engines.ray_cluster.LOST", 1.0)
    monkeypatch.setattr("audit.engines.ray_cluster.ASK", 0.5)
    run, address = tmp_path / "run", cluster.address
    # much to do a shard: actors go on without a head, and would be through before it is missed
    facts = {"rows_per_shard": 1, "num_noises": 6, "batch_size": 1, "second_look": 0.0}
    words = ["scan", inputs[0], "--model", inputs[1], "-o", run, "--engine", "ray", "--ray-address", address]
    for name, value in {**facts, "device": "cpu"}.items():
        words += [f"--{name.replace('_', '-')}", value]
    driver = start(*words, log=tmp_path / "log")
    after_a_commit(run, driver.kill)
    driver.join()
    assert driver.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    while shard_actors():  # or it commits one more, and the head is killed before the next driver knows it
        time.sleep(0.1)
    mine = replace(config(inputs, run, "ray"), **facts, workers=1, ray_address=address)
    after_a_commit(run, cluster.head_node.kill_gcs_server)
    with pytest.raises(Drained):
        scan(mine)
    assert f"head at {address} no longer answers" in capsys.readouterr().err
    assert len(Stage.open(Run.open(str(run)), SCAN).done()) < 60, "nothing was left to do: the test shows nothing"
    assert scan(replace(mine, engine="local", ray_address=None)).exit_code == 0
    check_rows(run)


def test_an_address_where_no_cluster_answers(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody there, somebody silent, somebody else, no address at all: one line within a bounded time."""
    monkeypatch.setattr("audit.engines.ray_cluster.CONNECT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            with other.accept()[0] as caller:
                caller.recv(100)
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        ports = [file.getsockname()[1] for file in (silent, other)]
        addresses = ["127.0.0.1:1", *(f"127.0.0.1:{port}" for port in ports), "127.0.0.1:x", "ray://127.0.0.1:1"]
        for address in addresses:
            mine = replace(config(inputs, tmp_path / "run", "ray"), ray_address=address)
            with pytest.raises(AuditError, match=rf"^--ray-address {address}: no Ray cluster answers there: [^\n]*$"):
                scan(mine)
    mine = replace(mine, engine="local")
    with pytest.raises(AuditError, match="--ray-address: goes with --engine ray"):
        scan(mine)
