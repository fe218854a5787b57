"""Every way in which a run folder has been made to lie, each a member of a kind that a mechanism closes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.storage import Folder
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import CONFIRM, MITIGATE, TRAJECTORIES, Stage
from audit.verdicts.confirm import read_null
from tests.command import be_audit, start, tree
from tests.conftest import once, some_captions
from tests.faults.harness import World, unscored

pytestmark = pytest.mark.faults


def jsonl(folder: Path, files: int = 4, rows: int = 5) -> list[str]:
    """A folder of JSONL files; returns their captions in order."""
    folder.mkdir(parents=True)
    captions = some_captions(files * rows)
    for number in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in captions[number * rows : (number + 1) * rows])
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return captions


def parquet(path: Path, rows: int = 20, word: str = "house") -> Path:
    pq.write_table(pa.table({"TEXT": [f"a {word} number {at:03d}" for at in range(rows)]}), path)
    return path


def scan(inputs: object, run: object, model: str, *more: object) -> list[object]:
    flags = ("--rows-per-shard", 4, "--batch-size", 4, "--second-look", 0)
    return ["scan", inputs, "-o", run, "--model", model, *flags, *more]


def captions_of(run: object) -> list[str]:
    return list(read_scores(Run.open(str(run)), ["caption"])["caption"].to_pylist())


def wait_for(condition: Callable[[], object], process: BaseProcess, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


@pytest.mark.parametrize("write", range(1, 25, 3))
def test_1_planning_that_is_killed_inside_its_own_input_begins_anew(tmp_path: Path, sd1: str, write: int) -> None:
    """The staged copy of the first try is no caption file of the second, nor of another run beside it."""
    captions = jsonl(tmp_path / "in")
    command = scan(tmp_path / "in", tmp_path / "in/run", sd1)
    process = start(*command, log=tmp_path / "log", environment={"FAULT": f"kill:{write}"})
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = be_audit(*scan(tmp_path / "in", tmp_path / "other", sd1))
    assert found.code == 0 and captions_of(tmp_path / "other") == captions, found
    found = be_audit(*command)
    assert found.code == 0, found
    assert captions_of(tmp_path / "in/run") == captions
    assert be_audit("verify", tmp_path / "in/run", "--deep").code == 0
    assert not (tmp_path / "in/run/_claims").exists()


@pytest.mark.parametrize("write", range(1, 17, 3))
def test_2_a_table_whose_planning_is_killed_goes_on(tmp_path: Path, sd1: str, write: int) -> None:
    """Before, between and after duplicates.arrow and plan.arrow."""
    command = scan(parquet(tmp_path / "x.parquet"), tmp_path / "run", sd1)
    process = start(*command, log=tmp_path / "log", environment={"FAULT": f"kill:{write}"})
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = be_audit(*command)
    assert found.code == 0 and len(captions_of(tmp_path / "run")) == 20, found


def test_2_a_folder_of_the_user_is_never_taken_for_a_killed_plan(tmp_path: Path, sd1: str) -> None:
    parquet(tmp_path / "x.parquet")
    (tmp_path / "mine/input").mkdir(parents=True)
    (tmp_path / "mine/input/precious").write_text("x")
    found = be_audit(*scan(tmp_path / "x.parquet", tmp_path / "mine", sd1))
    assert found.code == 2 and "not empty and not a run" in found.err
    assert (tmp_path / "mine/input/precious").exists()


@pytest.mark.parametrize("count", (2, 8))
def test_3_machines_that_start_together_share_one_plan(tmp_path: Path, sd1: str, count: int) -> None:
    captions = jsonl(tmp_path / "in")
    logs = [tmp_path / f"log{rank}" for rank in range(count)]
    flags = [("--rank", rank, "--world-size", count) for rank in range(count)]
    run = tmp_path / "run"
    every = [start(*scan(tmp_path / "in", run, sd1, *flags[rank]), log=logs[rank]) for rank in range(count)]
    for process in every:
        process.join(120)
    assert [process.exitcode for process in every] == [0] * count, [log.read_text() for log in logs]
    assert captions_of(run) == captions and be_audit("verify", run, "--deep").code == 0


def test_4_of_two_configurations_that_start_together_one_is_refused(tmp_path: Path, sd1: str) -> None:
    captions = jsonl(tmp_path / "in")
    run, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    every = [start(*scan(tmp_path / "in", run, sd1, "--seed", seed), log=logs[seed]) for seed in (0, 1)]
    for process in every:
        process.join(120)
    assert sorted(process.exitcode or 0 for process in every) == [0, 2], [log.read_text() for log in logs]
    refused = logs[[process.exitcode for process in every].index(2)].read_text()
    assert "nothing was touched. What differs (there -> now):" in refused and "  seed: " in refused
    assert captions_of(run) == captions


def test_a_claim_of_a_process_that_lives_is_waited_for_and_a_dead_ones_taken(tmp_path: Path, sd1: str) -> None:
    """Stopped within planning: the second waits; continued: both end with one run."""
    captions = jsonl(tmp_path / "in")
    run, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    command = scan(tmp_path / "in", run, sd1)
    first = start(*command, log=logs[0], environment={"FAULT": "stop:12"})
    wait_for(lambda: (run / "_claims/1.json").exists(), first, logs[0])
    second = start(*command, log=logs[1])
    wait_for(lambda: logs[1].exists() and "plans this run: waiting" in logs[1].read_text(), second, logs[1])
    assert first.pid is not None
    os.kill(first.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0), [log.read_text() for log in logs]
    assert captions_of(run) == captions


def test_5_a_confirm_that_loses_files_under_its_feet_never_exits_0(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.before("confirm", tmp_path / "run")
    confirm = importlib.import_module("audit.verdicts.confirm")
    null_of, lost = confirm._null_of, list[Path]()

    def lose(*arguments: object) -> object:
        if not lost:  # once
            lost.append(max(run.glob("trajectories/**/*.arrow")))
            lost[0].unlink()
        return null_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(confirm, "_null_of", lose)
        found = be_audit(*world.command("confirm", run))
    assert found.code == 3 and "2 candidates have no verdict yet" in found.out, found
    assert be_audit("report", run).code == 3 and be_audit("mitigate", run, "--iterations", 1).code == 3
    assert be_audit(*world.command("confirm", run)).code == 0 and world.check("confirm", run) is None
    assert be_audit("report", run).code in (0, 3)  # the mitigation was of the earlier verdicts


def test_5_a_confirm_discarded_by_another_process_says_so(world: World, tmp_path: Path) -> None:
    """`confirm --replace` beside a confirm: the first notices, and no commit of it counts for the second."""
    run, log = world.before("confirm", tmp_path / "run"), tmp_path / "log"
    first = start(*world.command("confirm", run), log=log)
    wait_for(lambda: list(run.glob("_commits/trajectories/*/*.json")), first, log)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    found = be_audit(*world.command("confirm", run), "--top-k", 4, "--replace")
    assert found.code == 0, found
    os.kill(first.pid, signal.SIGCONT)
    first.join(120)
    assert first.exitcode == 2 and "was discarded by another process" in log.read_text(), log.read_text()
    stage = Stage.open(Run.open(str(run)), CONFIRM)
    assert stage.complete and stage.items.num_rows == 4
    assert be_audit("verify", run).code == 0


def test_6_repair_drops_nothing_before_the_inputs_are_known_to_be_the_runs(tmp_path: Path, sd1: str) -> None:
    run, source = tmp_path / "run", parquet(tmp_path / "x.parquet")
    assert be_audit(*scan(source, run, sd1)).code == 0
    size = source.stat().st_size
    parquet(source, word="horse")
    assert source.stat().st_size == size
    importlib.import_module("audit.captions")._open.cache_clear()  # each command is a process of its own
    before = tree(run)
    found = be_audit("verify", run, "--deep", "--repair")
    assert found.code == 2 and found.err.startswith("Error: ") and tree(run) == before, found
    (run / "scores/000/00001.arrow").unlink()
    before = tree(run)
    found = be_audit("verify", run, "--repair")
    assert found.code == 2 and "inputs.0.footer_sha256" in found.err and tree(run) == before


def test_7_an_input_replaced_before_it_is_opened_is_found_out(tmp_path: Path, sd1: str) -> None:
    """Of the same size; moved over the second file while the first is scanned."""
    (tmp_path / "in").mkdir()
    one, two = parquet(tmp_path / "in/1.parquet"), parquet(tmp_path / "in/2.parquet", word="mouse")
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(*scan(tmp_path / "in", run, sd1), log=log)
    wait_for(lambda: (run / "_commits/scan/00000.json").exists(), process, log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    changed = parquet(tmp_path / "changed", word="moose")
    assert changed.stat().st_size == two.stat().st_size == one.stat().st_size
    changed.replace(two)
    os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 2 and "2.parquet: changed since it was planned" in log.read_text(), log.read_text()


def workers(process: BaseProcess) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "audit.engines.worker" in child.cmdline()]


@pytest.fixture(scope="module")
def scanned(shared: Path, sd1: str) -> Path:
    """A folder with x.parquet, 80 rows, and run/, its scan. Read it only."""

    def make(folder: Path) -> Path:
        assert be_audit(*scan(parquet(folder / "x.parquet", 80), folder / "run", sd1)).code == 0
        return folder

    return once(shared / "scanned", make)


def test_8_a_stopped_worker_is_killed_and_replaced(scanned: Path, tmp_path: Path, sd1: str) -> None:
    run, log = unscored(scanned / "run", tmp_path / "run"), tmp_path / "log"
    words = scan(scanned / "x.parquet", run, sd1, "--workers", 2)
    process = start(*words, log=log, environment={"SILENCE": "8"})
    wait_for(lambda: len(list((run / "_commits/scan").glob("[!.]*"))) > 1, process, log)
    worker, events = next((each, found) for each in workers(process) for found in run.glob(f"logs/*-{each.pid}.jsonl"))
    worker.suspend()
    while json.loads(events.read_text().splitlines()[-1])["event"] not in ("begin", "batch"):  # between two shards
        worker.resume()
        time.sleep(0.01)
        worker.suspend()
    status = be_audit("status", run)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert "gave no sign of life for" in log.read_text(), log.read_text()
    assert f"worker {worker.pid} on" in status.out and "is stopped (SIGSTOP)" in status.out, status.out
    assert len(captions_of(run)) == 80 and be_audit("verify", run, "--deep").code == 0


@pytest.mark.parametrize("signals, code", [((signal.SIGTERM,), 75), ((signal.SIGTERM, signal.SIGTERM), 130)])
def test_8_signals_act_on_a_parent_whose_workers_are_stopped(
    scanned: Path, tmp_path: Path, sd1: str, signals: tuple[int, ...], code: int
) -> None:
    run, log = unscored(scanned / "run", tmp_path / "run"), tmp_path / "log"
    process = start(*scan(scanned / "x.parquet", run, sd1, "--workers", 2), log=log)
    wait_for(lambda: list((run / "_commits/scan").glob("[!.]*")), process, log)
    owned = workers(process)
    for worker in owned:
        worker.suspend()
    assert process.pid is not None
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(1)
    process.join(30)
    assert process.exitcode == code, log.read_text()
    assert psutil.wait_procs(owned, timeout=10)[1] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit_plan(path: Path) -> None:
    """One row less in a shard, as a valid file."""
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    counts = table["row_count"].to_pylist()
    place = table.schema.get_field_index("row_count")
    table = table.set_column(place, table.schema.field(place), [pa.array([counts[0] - 1, *counts[1:]], pa.int32())])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", ("plan.arrow", "duplicates.arrow", "input/00000.arrow"))
@pytest.mark.parametrize("damage", (flip, edit_plan, Path.unlink), ids=("flipped", "edited", "missing"))
def test_9_what_a_run_rests_on_is_named_and_made_again(
    world: World, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = world.before("refine", tmp_path / "run")
    if damage is edit_plan and name != "plan.arrow":
        shutil.copy(run / "scores/000/00000.arrow", run / name)  # a foreign file
    else:
        damage(run / name)
    damaged = tree(run)
    for words in (["verify", run], ["verify", run, "--deep"]):
        found = be_audit(*words)
        assert found.code == 3 and found.err.startswith(f"{name}: ") and found.err.count("\n") == 1, found
    assert tree(run) == damaged
    if name == "plan.arrow":
        for words in (["status", run], ["report", run], world.command("scan", run)):
            found = be_audit(*words)
            assert found.code == 3 and "plan.arrow: " in found.err and "--repair" in found.err, found
    found = be_audit("verify", run, "--repair")
    assert found.code == 0, found
    assert world.check("scan", run) is None


def test_9_a_stages_rows_and_threshold_are_sealed_too(world: World, tmp_path: Path) -> None:
    run = world.before("mitigate", tmp_path / "run")
    for name in ("trajectories-*/items.arrow", "confirm-*/items.arrow", "confirm-*/null.json"):
        path = next(run.glob(f"stages/{name}"))
        flip(path)
        found = be_audit("verify", run)
        assert found.code == 3 and f"{path.name}: damaged" in found.err, found
        assert be_audit("verify", run, "--repair").code == 0, name
        assert world.check("confirm", run) is None
    assert read_null(Run.open(str(run))) is not None


def test_9_a_commit_that_names_another_shards_file_is_none(world: World, tmp_path: Path) -> None:
    run = world.before("refine", tmp_path / "run")
    commits = run / "_commits/scan"
    made = json.loads((commits / "00001.json").read_text())
    (commits / "00000.json").write_text(json.dumps({**made, "shard": 0}))
    (commits / "00077.json").write_text(json.dumps({**made, "shard": 77}))
    found = be_audit("verify", run)
    assert found.code == 3 and found.err.startswith("_commits/scan/00000.json: cannot be read"), found
    assert "5/6 shards" in be_audit("status", run).out
    assert be_audit(*world.command("scan", run)).code == 0 and world.check("scan", run) is None


def test_11_verdicts_are_shown_with_the_trajectories_they_are_of_or_not_at_all(world: World, tmp_path: Path) -> None:
    """Killed again and again within `confirm --replace`: never old verdicts beside new images."""
    run = world.before("report", tmp_path / "run")
    opened = Run.open(str(run))
    assert all(Stage.find(opened, kind) is not None for kind in (TRAJECTORIES, CONFIRM, MITIGATE))
    command = [*world.command("confirm", run), "--num-images", 3, "--replace"]
    for write in (4, 14, 24):
        process = start(*command, log=tmp_path / "log", environment={"FAULT": f"kill:{write}"})
        process.join(120)
        stages = {kind: Stage.find(opened, kind) for kind in (TRAJECTORIES, CONFIRM, MITIGATE)}
        images, verdicts = stages[TRAJECTORIES], stages[CONFIRM]
        if verdicts is not None:
            assert images is not None and verdicts.rests_on(images)
        if process.exitcode != 0:
            assert stages[MITIGATE] is None and "mitigate" not in be_audit("status", run).out
            assert be_audit("report", run).code in (0, 3)
    found = be_audit(*command)
    assert found.code == 0 and "6 candidates" in found.out, found
    assert be_audit("verify", run).code == 0


@pytest.mark.parametrize("url", ("memory://run", "x::y", "simplecache::file:///tmp/x"))
def test_12_places_that_keep_nothing_are_refused(
    tmp_path: Path, sd1: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "x.parquet")
    for words in (scan("x.parquet", url, sd1), ["index", "build", "x.parquet", "-o", url, "--sscd", "testbed"]):
        found = be_audit(*words)
        assert found.code == 2 and found.err.startswith(f"Error: {url}: ") and found.err.count("\n") == 1, found
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_leftovers_of_a_plan_on_a_store_are_no_captions(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    assert folder.create("_claims/1.json", b"{}") and not folder.create("_claims/1.json", b"{}")
