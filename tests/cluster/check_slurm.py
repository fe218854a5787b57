"""`make cluster`: the job scripts of docs/cluster.md on a real Slurm, with tasks killed, stopped and requeued.

Not collected by `make test`: it needs Debian's slurm-wlm and root.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError
from audit.engines.rank import find_rank
from audit.run.read import read_scores
from audit.run.run import Run
from tests.cluster.slurm import Slurm, slurm_cluster, wait_until
from tests.command import be_audit
from tests.conftest import some_captions

PAGE = Path(__file__).parents[2] / "docs/cluster.md"
FLAGS = "--device cpu --rows-per-shard 2 --batch-size 1 --num-noises 3"
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(sd1: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the scripts of the page expect to be told; 24 shards, six a rank."""
    file = tmp_path_factory.mktemp("slurm") / "captions.parquet"
    pq.write_table(pa.table({"TEXT": [*some_captions(46), *some_captions(2)]}), file)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"CAPTIONS": str(file), "MODEL": sd1, "FLAGS": FLAGS, "PATH": path}


@pytest.fixture(scope="module")
def expected(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    run = str(tmp_path_factory.mktemp("here") / "run")
    done = be_audit("scan", inputs["CAPTIONS"], "--model", inputs["MODEL"], "-o", run, *FLAGS.split())
    assert done.code == 0, done
    return rows(run)


def rows(run: str) -> pa.Table:
    return read_scores(Run.open(run)).select(["row_id", "caption", "status", "duplicate_of"])


def script(name: str, folder: Path) -> Path:
    """A script of the page, as it stands there."""
    [found] = re.findall(rf"```bash\n(#!/bin/bash\n# {name}\n.*?)```", PAGE.read_text(), re.DOTALL)
    file = folder / name
    file.write_text(found)
    return file


def process_of(job: str, rank: str, seconds: float = 400) -> psutil.Process:
    """The be-audit process of a job whose array task or step process is `rank`, once it has committed a shard."""
    found: list[psutil.Process] = []

    def there() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(word.endswith("bin/be-audit") for word in words[:2]) and "srun" not in words[0]:
                try:
                    known = process.environ()
                except psutil.Error:
                    continue
                task = known.get("SLURM_ARRAY_TASK_ID", known.get("SLURM_PROCID"))
                if job in (known.get("SLURM_ARRAY_JOB_ID"), known.get("SLURM_JOB_ID")) and task == rank:
                    found.append(process)
                    return True
        return False

    wait_until(there, seconds, lambda: f"job {job} has no be-audit of rank {rank}")
    return found[0]


def wait_for_commit(run: str, rank: int) -> None:
    """Until one of four ranks has committed a shard."""
    commits = Path(run) / "_commits/scan"
    wait_until(
        lambda: commits.is_dir() and any(int(path.stem) % 4 == rank for path in commits.glob("*.json")),
        400,
        lambda: f"rank {rank} commits nothing",
    )


def outputs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.out")))


PRINT = 'env | grep ^SLURM_ > "$0.$SLURM_JOB_ID.$SLURM_PROCID.env"'


def test_ranks_by_the_variables_slurm_really_sets(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {
        "array": (["--array=0-3"], "", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        "offset": (["--array=5-11:2%3"], "", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        "uneven": (["--array=1,2,5"], "", ["evenly"] * 3),
        "one": (["--array=7"], "", [(0, 1)]),
        "batch": (["--ntasks=4"], "", [(0, 1)]),
        "step": (["--ntasks=4"], "srun", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        "half": (["--ntasks=4"], "srun -n 2", [(0, 2), (1, 2)]),
        "both": (["--array=0-1", "--ntasks=2"], "srun", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        "single": (["--array=0-1"], "srun", [(0, 2), (1, 2)]),
    }
    for name, (flags, prefix, _) in jobs.items():
        file = tmp_path / f"{name}.sh"
        file.write_text(f"#!/bin/bash\n{prefix} bash -c '{PRINT}' {tmp_path}/{name}\n")
        slurm.submit(file, *flags)
    wait_until(lambda: not slurm("squeue", "-h").strip(), 200, slurm.logs)
    for name, (_, _, expected) in jobs.items():
        found: list[tuple[int, int] | str] = []
        for file in tmp_path.glob(f"{name}.*.env"):
            with monkeypatch.context() as patch:
                for line in file.read_text().splitlines():
                    patch.setenv(*line.split("=", 1))
                try:
                    found.append(find_rank(None, None))
                except AuditError as error:
                    found.append("evenly" if "evenly" in str(error) else str(error))
        assert sorted(found, key=str) == expected, name


def test_an_array_with_a_task_killed_one_stopped_and_one_requeued(
    slurm: Slurm, inputs: dict[str, str], expected: pa.Table, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    job = slurm.submit(script("array.sh", tmp_path), **inputs, RUN=run)
    for task, strike in (
        (1, lambda process: process.kill()),
        (2, lambda _: slurm("scontrol", "requeue", f"{job}_2")),
        (3, lambda _: slurm("scancel", "--signal=TERM", f"{job}_3")),
    ):
        process = process_of(str(job), str(task))
        wait_for_commit(run, task)
        assert process.is_running(), "it was done before it could be struck: the test shows nothing"
        strike(process)
    tasks = slurm.wait(job, 4)
    said = outputs(tmp_path)
    ends = {task: (fields["JobState"], fields["ExitCode"], fields["Restarts"]) for task, fields in tasks.items()}
    done = ("COMPLETED", "0:0")
    assert ends == {0: (*done, "0"), 1: (*done, "1"), 2: (*done, "1"), 3: (*done, "1")}, said
    for task in range(4):
        assert f"rank {task} of 4 (SLURM_ARRAY_TASK_ID)" in said
    assert rows(run).equals(expected)


def test_a_step_with_a_rank_killed(slurm: Slurm, inputs: dict[str, str], expected: pa.Table, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    job = slurm.submit(script("step.sh", tmp_path), **inputs, RUN=run)
    process = process_of(str(job), "1")
    wait_for_commit(run, 1)
    assert process.is_running(), "it was done before it could be killed: the test shows nothing"
    process.kill()
    fields = slurm.wait(job)[0]
    said = outputs(tmp_path)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "rank 3 of 4 (SLURM_PROCID)" in said
    assert rows(run).equals(expected)


def test_bad_input_is_not_requeued(slurm: Slurm, inputs: dict[str, str], tmp_path: Path) -> None:
    missing = {**inputs, "CAPTIONS": str(tmp_path / "none.parquet"), "RUN": str(tmp_path / "run")}
    job = slurm.submit(script("array.sh", tmp_path), "--array=0-1", **missing)
    for fields in slurm.wait(job, 2).values():
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), outputs(tmp_path)
    assert "none.parquet" in outputs(tmp_path)
