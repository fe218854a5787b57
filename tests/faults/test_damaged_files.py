"""Whatever lies in a folder of ours or comes from outside: one line, exit 2 or 3; never a traceback, never a hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.command import be_audit
from tests.faults.harness import World

pytestmark = pytest.mark.faults
COMMANDS = ("status", "verify", "report", "sql")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, sd1: str) -> World:
    return World(tmp_path_factory.mktemp("world"), sd1)


DEEP = b"[" * 100_000 + b"]" * 100_000
CONTENTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    DEEP,
    b'{"format": ' + b"9" * 5000 + b"}",
    b'{"format": 3, "a": ' + DEEP + b"}",
    b"ARROW1\0\0",
)


def _set_first(value: object) -> Callable[[bytes], bytes]:
    """Every value of a JSON object, one after the other, becomes another."""

    def change(data: bytes) -> bytes:
        try:
            facts = json.loads(data)
        except ValueError:
            return data[:-3]
        if isinstance(facts, list):
            facts = {"0": facts}
        return json.dumps(dict.fromkeys(facts, value)).encode()

    return change


damages = st.one_of(
    st.sampled_from(CONTENTS).map(lambda content: lambda data: content),
    st.sampled_from([None, -1, 10**400, float("nan"), "x", [], {"a": None}, True]).map(_set_first),
    st.tuples(st.floats(0, 0.999), st.integers(1, 255)).map(
        lambda at: (
            lambda data: (
                data[: int(at[0] * len(data))]
                + bytes([data[int(at[0] * len(data))] ^ at[1]])
                + data[int(at[0] * len(data)) + 1 :]
            )
        )
    ),
    st.floats(0, 0.999).map(lambda part: lambda data: data[: int(part * len(data))]),
    st.floats(0, 0.95).map(lambda part: lambda data: data[: -int(part * 60) - 1] + b"\0" * (int(part * 60) + 1)),
)


def told(words: list[object]) -> int:
    """The exit code of a command that may only say one line of error."""
    found = be_audit(*words)  # an exception would be a traceback, and is raised
    assert found.code in (0, 2, 3), found
    if found.code == 2:
        lines = [line for line in found.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and len(found.err) < 4000, found.err[:4000]
    return found.code


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_of_a_run_is_one_line(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = world.before("report", tmp_path_factory.mktemp("damaged") / "run")
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    kinds = sorted({name.split("/")[0] for name in names})
    kind = data.draw(st.sampled_from(kinds))
    path = run / data.draw(st.sampled_from([name for name in names if name.split("/")[0] == kind]))
    path.write_bytes(data.draw(damages)(path.read_bytes()))
    for command in COMMANDS:
        told(["sql", "summary", run] if command == "sql" else [command, run])
    shutil.rmtree(run.parent)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_of_an_index_is_one_line(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    index = Path(shutil.copytree(world.root / "index", tmp_path_factory.mktemp("damaged") / "index"))
    names = sorted(str(path.relative_to(index)) for path in index.rglob("*") if path.is_file())
    path = index / data.draw(st.sampled_from(names))
    path.write_bytes(data.draw(damages)(path.read_bytes()))
    picture = world.root / "pictures/1.png"
    for words in (
        ["index", "info", index],
        ["index", "verify", index, "--deep"],
        ["index", "search", picture, "--index", index],
    ):
        told(words)
    shutil.rmtree(index.parent)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_files_from_outside_are_one_line(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("outside")
    run = world.before("report", folder / "run")
    name, content = data.draw(
        st.sampled_from(
            [
                ("labels.csv", b"TEXT,label\na red house number 0,global\n"),
                ("labels.jsonl", b'{"TEXT": "x", "label": "none"}\n'),
                ("thresholds.json", b'{"thresholds": {"ld_energy": {"threshold": 1.0}}}'),
                ("captions.jsonl", b'{"text": "x"}\n{"text": "y"}\n'),
                ("captions.csv", b"text\nx\ny\n"),
                ("captions.parquet", (world.root / "captions.parquet").read_bytes()),
            ]
        )
    )
    path = folder / name
    path.write_bytes(data.draw(damages)(content))
    words = {
        "labels": ["evaluate", run, "--labels", path, "--label-col", "label", "-o", folder / "out"],
        "thresholds": ["report", run, "--thresholds", path],
        "captions": ["scan", path, "-o", folder / "new", "--model", world.model, "--dry-run"],
    }[name.split(".")[0]]
    told(words)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "flags",
    [
        ("--limit", 10**30),
        ("--batch-size", 10**12),
        ("--num-noises", 10**9),
        ("--workers", 10**6),
        ("--steps", 2**40),
        ("--rank", 10**20, "--world-size", 10**21),
    ],
)
def test_absurd_integers_are_refused(world: World, tmp_path: Path, flags: tuple[object, ...]) -> None:
    found = be_audit("scan", world.root / "captions.parquet", "-o", tmp_path / "run", "--model", world.model, *flags)
    assert found.code == 2 and "Error" in found.err and not (tmp_path / "run").exists()


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


BE_AUDIT = f"{sys.executable} -m audit.cli"


def test_closed_streams_little_memory_and_odd_names(world: World, tmp_path: Path) -> None:
    run = world.before("report", tmp_path / "run")
    assert shell(f"{BE_AUDIT} status {run} 2>&-").returncode == 0
    assert shell(f"{BE_AUDIT} status {run} >&- 2>&- <&-").returncode in (0, 2)
    done = shell(f"ulimit -v 1500000; {BE_AUDIT} status {run}")
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    scan = f"{BE_AUDIT} scan {world.root}/captions.parquet -o {tmp_path}/new --model {world.model}"
    done = shell(f"ulimit -v 1500000; {scan}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "terminate" not in done.stderr, done.stderr
    done = shell(scan, SLURM_ARRAY_TASK_ID="x", SLURM_ARRAY_TASK_COUNT="2")
    assert done.returncode == 2 and done.stderr.startswith("Error: SLURM_ARRAY_TASK_ID=x"), done.stderr
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.parquet")
    shutil.copy(world.root / "captions.parquet", odd)
    words = [sys.executable, "-m", "audit.cli", "scan", odd, "-o", str(tmp_path / "new"), "--model", world.model]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not UTF-8" in done.stderr and done.stderr.count("\n") == 1, done.stderr
