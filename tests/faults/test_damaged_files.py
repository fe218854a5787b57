"""Whatever lies in a folder of ours or comes from outside: one line, exit 2 or 3; never a traceback, never a hang."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.captions import TextFormat, plan_captions, read_shard
from audit.index import Index
from tests.command import be_audit
from tests.faults.harness import World

pytestmark = pytest.mark.faults
COMMANDS = ("status", "verify", "report", "sql")


def test_what_is_not_damaged_is_answered(world: World, tmp_path: Path) -> None:
    """Or the tests below would take a word that was typed wrong for a refusal."""
    run = world.before("report", tmp_path / "run")
    for words in (["status", run], ["verify", run], ["report", run], ["sql", "errors", run]):
        assert told(words) == 0


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
        except (ValueError, RecursionError):
            return data[:-3]
        if not isinstance(facts, dict):
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


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written where the command was typed, and no file makes it take a gigabyte."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("audit.base.commits.MOVING", 0.01)  # nobody is at work on these
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert list(here.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def told(words: list[object]) -> int:
    """The exit code of a command that may only say one line of error."""
    found = be_audit(*words)  # an exception would be a traceback, and is raised
    assert found.code in (0, 2, 3), found
    if found.code == 2:
        lines = [line for line in found.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and len(found.err) < 4000, found.err[:4000]
    return found.code


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_10_a_damaged_file_of_a_run_is_one_line(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = world.before("report", tmp_path_factory.mktemp("damaged") / "run")
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    kinds = sorted({name.split("/")[0] for name in names})
    kind = data.draw(st.sampled_from(kinds))
    path = run / data.draw(st.sampled_from([name for name in names if name.split("/")[0] == kind]))
    path.write_bytes(data.draw(damages)(path.read_bytes()))
    for command in COMMANDS:
        told(["sql", "errors", run] if command == "sql" else [command, run])
    shutil.rmtree(run.parent)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_10_a_damaged_file_of_an_index_is_one_line(
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


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_stage_that_goes_on_from_a_damaged_run_is_one_line(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    stage = data.draw(st.sampled_from(["refine", "confirm", "mitigate"]))
    run = world.before(stage, tmp_path_factory.mktemp("damaged") / "run")
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    kind = data.draw(st.sampled_from(sorted({name.split("/")[0] for name in names})))
    path = run / data.draw(st.sampled_from([name for name in names if name.split("/")[0] == kind]))
    path.write_bytes(data.draw(damages)(path.read_bytes()))
    told(world.command(stage, run))
    shutil.rmtree(run.parent)


PICTURES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "tiff": "TIFF", "bmp": "BMP"}


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)).save(buffer, PICTURES[kind])
    return buffer.getvalue()


def tarred(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from([*PICTURES, "tar", "parquet", "json"]), spoil=st.lists(damages, min_size=1, max_size=3))
def test_pictures_and_tars_from_outside_are_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, spoil: list[Callable[[bytes], bytes]]
) -> None:
    """A damaged one beside good ones is a row error or is left out; none of the good ones is lost."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "in").mkdir()
    for number in range(2):
        (folder / "in" / f"good{number}.png").write_bytes(encoded("png"))
    if kind == "tar":
        content = tarred([("0.png", encoded("png")), ("0.json", b'{"url": "u"}'), ("1.jpg", encoded("jpg"))])
    elif kind == "parquet":
        pq.write_table(pa.table({"image": [encoded("png")] * 3, "url": ["u", "v", "w"]}), folder / "x")
        content = (folder / "x").read_bytes()
    else:
        content = b'{"url": "u", "caption": "c", "key": 3}' if kind == "json" else encoded(kind)
    for damage in spoil:
        content = damage(content) if content else content
    (folder / "in" / f"{'good0' if kind == 'json' else 'x'}.{kind}").write_bytes(content)
    words: list[object] = ["index", "build", folder / "in", "-o", folder / "index", "--sscd", "testbed"]
    code = told(words)
    if kind not in ("tar", "parquet"):
        assert code in (0, 3) and len(Index.open(str(folder / "index"))) >= 2
    assert {path.name for path in folder.iterdir()} <= {"in", "index", "x"}
    shutil.rmtree(folder)


PIECES = (
    *("caption,url", "caption\turl", '"', '"a', "a,b", "a\tb", "[", "{", "]", "}", ",", "\0", "\ufeff", "NaN"),
    *('{"caption": "a"}', '{"a": {"caption": "b"}', '[{"caption": "c"},', '{"caption": 3}', '{"caption": ["a"]}'),
)
LINES = st.lists(
    st.one_of(st.one_of(st.sampled_from(PIECES), st.text(max_size=12)).map(str.encode), st.binary(max_size=8)),
    max_size=12,
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lines=LINES,
    name=st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x.json", "x.csv.gz", "x.jsonl.zst", "x.parquet", "x.arrow"]),
    end=st.sampled_from([b"\n", b"\r\n", b"\r", b""]),
    flags=st.sampled_from([{}, {"caption_col": "caption"}, {"text_format": TextFormat(header=False)}]),
)
def test_any_text_of_captions_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], name: str, end: bytes, flags: dict[str, Any]
) -> None:
    """Whatever a text file holds: an error of one line, or a plan all of whose rows are read."""
    folder = tmp_path_factory.mktemp("text")
    content = end.join(lines)
    content = gzip.compress(content) if name.endswith(".gz") and len(lines) % 2 else content
    (folder / name).write_bytes(content)
    staging = Folder(str(folder / "run"))
    options: dict[str, Any] = {"caption_col": None, "keep_cols": None, "limit": None, "rows_per_shard": 3, **flags}
    try:
        plan = plan_captions([str(folder / name)], staging=staging, **options)
    except AuditError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert sum(read_shard(plan, shard, staging).num_rows for shard in range(len(plan))) == plan.num_rows
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
def test_10_absurd_integers_are_refused(world: World, tmp_path: Path, flags: tuple[object, ...]) -> None:
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


def test_10_closed_streams_little_memory_and_odd_names(world: World, tmp_path: Path) -> None:
    run = world.before("report", tmp_path / "run")
    assert shell(f"{BE_AUDIT} status {run} 2>&-").returncode == 0
    assert shell(f"{BE_AUDIT} status {run} >&- 2>&- <&-").returncode in (0, 2)
    # what it takes is 1.5 GB: at that very limit a library written in Rust aborts the process
    done = shell(f"ulimit -v 1000000; {BE_AUDIT} status {run}")
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
