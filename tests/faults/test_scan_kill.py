"""A scan killed, stopped and interrupted at any moment: every row exactly once, nothing torn, nothing redone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.run.read import dataset, read_scores
from audit.run.run import Run
from audit.run.verify import verify_run
from tests.command import be_audit, start, tree
from tests.conftest import once, some_captions
from tests.faults.harness import unscored

SHARDS, ROWS = 25, 6
KILLS = 12


@pytest.fixture(scope="module")
def inputs(shared: Path) -> Path:
    """150 rows; every tenth caption repeats an earlier one."""
    captions = some_captions(SHARDS * ROWS)
    captions[10::10] = captions[: len(captions[10::10])]

    def make(folder: Path) -> Path:
        pq.write_table(pa.table({"TEXT": captions}), folder / "captions.parquet")
        return folder / "captions.parquet"

    return once(shared / "kill", make)


@pytest.fixture(scope="module")
def arguments(inputs: Path, sd1: str) -> list[object]:
    return ["scan", inputs, "--model", sd1, "--rows-per-shard", ROWS, "--batch-size", 4, "-o"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[object], shared: Path) -> Path:
    """A scan that was left alone."""
    return once(shared / "undisturbed", lambda folder: scanned(arguments, folder / "run"))


def scanned(arguments: list[object], run: Path, *flags: object) -> Path:
    """The run of a scan."""
    assert be_audit(*arguments, run, *flags).code == 0
    return run


@pytest.fixture(scope="module")
def looked_again(arguments: list[object], shared: Path) -> Path:
    """The same with a second look at nearly all of it."""
    return once(shared / "looked-again", lambda folder: scanned(arguments, folder / "run", "--second-look", 0.9))


def assert_whole(run: Path) -> None:
    """Whatever has its final name parses."""
    names = [Path(folder, name) for folder, _, files in os.walk(run) for name in files if not name.startswith(".")]
    for path in names:  # a claim may go meanwhile
        with contextlib.suppress(FileNotFoundError):
            if path.suffix == ".arrow":
                pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
            elif path.suffix == ".json":
                json.loads(path.read_bytes())


def committed(run: Path) -> dict[str, object]:
    """Commits and the files they are of, with times and bytes."""
    done = [json.loads(path.read_bytes())["file"] for path in (run / "_commits").rglob("[!.]*.json")]
    return {name: seen for name, seen in tree(run).items() if name in done or name.startswith("_commits/scan/0")}


def assert_equal(run: Path, undisturbed: Path) -> None:
    """Every row exactly once, with the scores of the scan that was left alone."""
    stored = dataset(Run.open(str(run)))
    assert stored is not None and stored.count_rows() == SHARDS * ROWS
    found, expected = (read_scores(Run.open(str(folder))) for folder in (run, undisturbed))
    for name in ("row_id", "caption", "status", "duplicate_of"):
        assert found[name].equals(expected[name])
    for name in ("magnitude", "ld", "ld_energy", "webster"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-4)
    assert verify_run(str(run), deep=True).whole
    left = [path.name for path in run.rglob("*") if path.name.startswith(".")]
    assert left == []  # what dead processes had begun to write is swept


def wait_for(condition: Callable[[], object], process: BaseProcess, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def commits(run: Path) -> int:
    return len(list((run / "_commits" / "scan").glob("[!.]*.json")))


def test_kills_at_random_moments(arguments: list[object], undisturbed: Path, tmp_path: Path) -> None:
    moments, log = random.Random(5), tmp_path / "log"
    kills, number, during = 0, 0, set()
    while kills < KILLS:
        run = tmp_path / f"run{number}"
        before = committed(run)
        process = start(*arguments, run, log=log)
        # a few commits further, of whatever stage, then a random moment: a clock alone would come before a slow machine
        # begins, and when a fast one is done
        further = every_commit(run) + moments.randrange(0, 6)
        while process.is_alive() and every_commit(run) < further:
            assert_whole(run)
            time.sleep(0.03)  # to look is work, too
        moment = time.monotonic() + moments.uniform(0, 0.1)
        while process.is_alive() and time.monotonic() < moment:
            assert_whole(run)
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        assert_whole(run)
        after = committed(run)
        assert {name: after.get(name) for name in before} == before  # neither lost nor computed again
        if process.exitcode == 0:
            assert_equal(run, undisturbed)
            number += 1
        else:
            kills += 1
            during.add(every_commit(run))
    assert be_audit(*arguments, run).code == 0
    assert_equal(run, undisturbed)
    assert len(during) > 5  # they did come at different moments


def test_sigterm_drains_and_the_same_command_goes_on(
    arguments: list[object], undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(*arguments, run, log=log)
    wait_for(lambda: commits(run) >= 2, process, log)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75 and "goes on from here" in log.read_text()
    assert "Traceback" not in log.read_text()
    before = committed(run)
    assert be_audit("status", run).code == 0
    assert be_audit(*arguments, run).code == 0
    after = committed(run)
    assert {name: after[name] for name in before} == before
    assert_equal(run, undisturbed)


def every_commit(run: Path) -> int:
    return len(list((run / "_commits").rglob("[!.]*.json")))


def looks(run: Path) -> int:
    return len(list((run / "_commits" / "second_look").rglob("[!.]*.json")))


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM))
def test_a_second_look_is_stopped_and_goes_on(
    arguments: list[object], undisturbed: Path, looked_again: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Every row of it once, in whatever process, with the scores of one that was left alone."""
    run, log = tmp_path / "run", tmp_path / "log"
    stops = 0
    for shards in (1, 9, 17):
        process = start(*arguments, run, "--second-look", 0.9, log=log)
        wait_for(lambda at=shards: looks(run) >= at, process, log)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == (75 if number == signal.SIGTERM else -signal.SIGKILL), log.read_text()
        stops += looks(run) < SHARDS
        assert_whole(run)
    assert stops == 3
    workers = 2 if number == signal.SIGKILL else 0
    assert be_audit(*arguments, run, "--second-look", 0.9, "--workers", workers).code == 0
    found, expected = (read_scores(Run.open(str(folder))) for folder in (run, looked_again))
    assert found["num_noises"].equals(expected["num_noises"]) and found["num_noises"].to_pylist().count(4) >= 121
    for name in ("magnitude", "ld", "ld_energy", "excess", "excess_pca"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-4)
    assert verify_run(str(run), deep=True).whole
    first = read_scores(Run.open(str(run)), ["magnitude"], first_look=True)["magnitude"].to_numpy()
    alone = read_scores(Run.open(str(undisturbed)))
    once = alone["num_noises"].to_numpy() == 1
    np.testing.assert_allclose(first[once], alone["magnitude"].to_numpy()[once], rtol=1e-4)


def workers(process: BaseProcess) -> list[psutil.Process]:
    assert process.pid is not None
    children = psutil.Process(process.pid).children()
    return [child for child in children if "audit.engines.worker" in child.cmdline()]


def test_a_killed_worker_is_replaced(arguments: list[object], undisturbed: Path, tmp_path: Path) -> None:
    run, log = unscored(undisturbed, tmp_path / "run"), tmp_path / "log"
    process = start(*arguments, run, "--workers", 2, log=log)
    wait_for(lambda: commits(run) >= 2, process, log)
    victim = workers(process)[0]

    def shards_of_victim() -> int:
        made = [json.loads(path.read_bytes()) for path in (run / "_commits").rglob("[!.]*.json")]
        return sum(commit["worker"]["pid"] == victim.pid for commit in made)

    known = shards_of_victim()
    wait_for(lambda: shards_of_victim() > known, process, log)
    time.sleep(0.01)  # by then it has the next shard in hand
    victim.kill()
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    died = "worker died with exit code -9"
    assert died in log.read_text()
    attempts = list((run / "_attempts" / "scan").glob("*.json"))  # none where it had several shards in hand
    assert [json.loads(path.read_bytes())[0]["error"] for path in attempts] in ([], [died])
    assert_equal(run, undisturbed)


def test_killed_and_stopped_parents_leave_no_worker(arguments: list[object], undisturbed: Path, tmp_path: Path) -> None:
    run, log = unscored(undisturbed, tmp_path / "run"), tmp_path / "log"
    process = start(*arguments, run, "--workers", 2, log=log)
    wait_for(lambda: commits(run) >= 1, process, log)
    owned = workers(process)
    process.kill()
    assert psutil.wait_procs(owned, timeout=60)[1] == []
    process = start(*arguments, run, "--workers", 2, log=log)
    known = commits(run)
    wait_for(lambda: commits(run) > known, process, log)
    owned = workers(process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75, log.read_text()
    assert psutil.wait_procs(owned, timeout=60)[1] == []
    assert be_audit(*arguments, run).code == 0
    assert_equal(run, undisturbed)


def test_a_second_interrupt_does_not_wait(arguments: list[object], undisturbed: Path, tmp_path: Path) -> None:
    run, log = unscored(undisturbed, tmp_path / "run"), tmp_path / "log"
    process = start(*arguments, run, "--workers", 2, log=log)
    wait_for(lambda: commits(run) >= 1, process, log)
    owned = workers(process)
    for worker in owned:
        worker.suspend()  # so that the first interrupt cannot be done with before the second
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert psutil.wait_procs(owned, timeout=60)[1] == []
    assert process.exitcode == 130 and "Interrupted." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert_whole(run)
    assert be_audit("status", run).code == 0
