"""A small audit to be disturbed: what every stage gives when it is left alone, and the same again after a fault."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from audit.index import Index, verify_index
from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.verify import verify_run
from tests import command_imports  # noqa: F401  # the seconds a stage takes are then those of its work
from tests.command import be_audit, start
from tests.faults import inject  # noqa: F401

STAGES = ("index", "scan", "refine", "confirm", "mitigate", "report")
ROWS = 24


def captions(count: int) -> list[str]:
    """Captions, every fifth of which repeats an earlier one."""
    made = [f"a {['red', 'blue', 'old', 'tiny'][at % 4]} house number {at}" for at in range(count)]
    made[5::5] = made[: len(made[5::5])]
    return made


def unscored(scanned: Path, run: Path) -> Path:
    """A copy of a scanned run that lacks its scores alone: of a scan's stages, each with workers of its own, one."""
    shutil.copytree(scanned, run)
    shutil.rmtree(run / "scores")
    shutil.rmtree(run / "_commits/scan")
    return run


class World:
    """Inputs, an index, and a run as it is before every stage and after it.

    Args:
        root: a new folder. model: a tiny diffusers folder.
    """

    def __init__(self, root: Path, model: str) -> None:
        self.root, self.model = root, model
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"TEXT": captions(ROWS)}), root / "captions.parquet")
        lines = (json.dumps({"text": text}) + "\n" for text in captions(ROWS))
        (root / "captions.jsonl").write_text("".join(lines))
        (root / "pictures").mkdir()
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"pictures/{number}.png")
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}  # that a stage takes where nothing disturbs it
        for stage in STAGES:
            run = root / ("index" if stage == "index" else "run")
            if run.exists():
                shutil.copytree(run, root / f"before-{stage}")
            started = time.monotonic()
            done = be_audit(*self.command(stage, run))
            assert done.code == 0, (stage, done)
            self.seconds[stage] = time.monotonic() - started
            self.expected[stage] = self.seen(stage, run)

    def command(self, stage: str, run: Path | str) -> list[object]:
        """What is typed for a stage."""
        scan = ["scan", self.root / "captions.jsonl", "-o", run, "--model", self.model, "--rows-per-shard", 4]
        scan += ["--batch-size", 4, "--steps", 2, "--max-error-rate", 0]
        confirm = ["confirm", run, "--index", self.root / "index", "--top-k", 6, "--num-images", 11]
        mitigate = ["mitigate", run, "--iterations", 1, "--num-images", 2, "--target", 0.001]
        return {
            "index": ["index", "build", self.root / "pictures", "-o", run, "--sscd", "testbed", "--rows-per-part", 8],
            "scan": scan,
            "refine": [*scan, "--refine", 0.3],
            "confirm": [*confirm, "--ls-threshold", 1e6, "--batch-size", 16, "--max-error-rate", 0],
            "mitigate": [*mitigate, "--max-error-rate", 0],
            "report": ["report", run, "--format", "jsonl"],
        }[stage]

    def before(self, stage: str, run: Path) -> Path:
        """A run as it is before a stage."""
        source = self.root / f"before-{stage}"
        if source.exists():
            shutil.copytree(source, run)
        return run

    def seen(self, stage: str, run: Path | str) -> Any:
        """What a stage has made: the rows that must be there exactly once, and their hashes."""
        if stage == "index":
            index = Index.open(str(run))
            keys, vectors = index.facts(index.ids())["key"].to_pylist(), index.vectors(index.ids())
            return [[key, f"{vector[0]:.2f}"] for key, vector in zip(keys, vectors, strict=True)]
        opened = Run.open(str(run))
        if stage == "report":
            facts = json.loads((Path(run) / "report/report.json").read_text())
            return [facts[name] for name in ("planned", "scanned", "verdicts", "listed", "decided")]
        if stage == "scan":
            table = read_scores(opened, ["row_id", "caption", "status", "duplicate_of", "magnitude", "ld_energy"])
        else:
            names = {"refine": ["row_id", "image_index", "magnitude_all"], "confirm": ["row_id", "verdict"]}
            columns = names.get(stage, ["row_id", "image_index", "verdict_after", "loss_after"])
            found = read_stage(opened, stage, columns)
            assert found is not None
            table = found.sort_by([(name, "ascending") for name in columns[: 1 + ("image_index" in columns)]])
        return [
            [float(f"{value:.3g}") if isinstance(value, float) else value for value in row.values()]
            for row in table.to_pylist()
        ]

    def check(self, stage: str, run: Path | str) -> str | None:
        """What is wrong after a stage's command has exited 0: lost, doubled or other rows; None when nothing is."""
        found, expected = self.seen(stage, run), self.expected[stage]
        if len(found) != len(expected):
            return f"{len(found)} rows where {len(expected)} should be"
        if found != expected:
            return f"other rows: {next((a, b) for a, b in zip(found, expected, strict=True) if a != b)}"
        problems = verify_index(str(run), deep=True) if stage == "index" else verify_run(str(run), deep=True).problems
        return problems[0] if problems else None


@dataclass(frozen=True)
class Fault:
    """What is done to a command.

    Attributes:
        name: what it is. codes: exit codes the disturbed command may have; 0 only with every row there.
        environment: of the process (tests.faults.inject). act: done to it once it runs, given the seconds it takes.
    """

    name: str
    codes: tuple[int, ...]
    environment: Callable[[random.Random, str], dict[str, str]] = lambda *_: {}
    act: Callable[[BaseProcess, random.Random, float], None] = lambda *_: None


def _signals(*numbers: int) -> Callable[[BaseProcess, random.Random, float], None]:
    def act(process: BaseProcess, moments: random.Random, seconds: float) -> None:
        time.sleep(moments.uniform(0, 1.2 * seconds))
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)
                    time.sleep(0.05)

    return act


def _at(kind: str, most: int) -> Callable[[random.Random, str], dict[str, str]]:
    """At one of the first `most` writes or calls of a scan; the other stages have about a third as many."""
    return lambda moments, stage: {"FAULT": f"{kind}:{moments.randrange(1, most if stage == 'scan' else most // 3)}"}


KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM  # SIGTERM before the command has begun to listen
FAULTS = (
    Fault("SIGKILL at any moment", (0, KILLED), act=_signals(signal.SIGKILL)),
    Fault("SIGKILL at a write", (0, KILLED), _at("kill", 90)),
    Fault("SIGKILL, no hard links", (0, KILLED), lambda *given: {"LINKS": "none"} | _at("kill", 90)(*given)),
    Fault("SIGTERM", (0, 75, TERMINATED), act=_signals(signal.SIGTERM)),
    Fault("Ctrl-C twice", (0, 75, 130, 1), act=_signals(signal.SIGINT, signal.SIGINT)),
    Fault("SIGSTOP and SIGCONT", (0,), act=_signals(signal.SIGSTOP, signal.SIGCONT)),
    Fault("full disk", (0, 2, 3), _at("full", 90)),
    Fault("no inodes", (0, 2, 3), _at("inodes", 90)),
    Fault("read-only", (0, 2, 3), _at("readonly", 90)),
)
STORE_FAULTS = (
    Fault("store fails once", (0, 2, 3), _at("store", 120)),
    Fault("store is lost", (0, 2, 3), _at("lost", 120)),
    Fault("store lies", (0, 2, 3), _at("lie", 120)),
    Fault("SIGKILL at a put", (0, KILLED), _at("kill", 40)),
)


@dataclass(frozen=True)
class Outcome:
    """How a disturbed command and the ones after it ended; `problem` is None where all is as it should be."""

    code: int | None
    problem: str | None
    wrong_code: bool = False


def disturb(
    world: World, stage: str, faults: Sequence[Fault], run: Path, moments: random.Random, url: str = ""
) -> list[Outcome]:
    """Run a stage under one fault after the other, then the same command until it exits 0, and compare.

    Args:
        run: a new folder. moments: when and where. url: of the run, where it is not the folder's path.

    Returns:
        an outcome for each fault that came to act: none does after a command that exits 0. What is wrong in the end is
        the last one's.
    """
    world.before(stage, run)
    log = run.parent / f"{run.name}.log"
    log.touch()
    outcomes: list[Outcome] = []
    for fault in faults:
        log.write_text("")
        outcomes.append(_disturbed(world, stage, fault, url or run, log, moments))
        if outcomes[-1].problem is not None or outcomes[-1].code == 0:
            return outcomes
    for _ in range(3):
        again = be_audit(*world.command(stage, url or run))
        if again.code == 0:
            problem = world.check(stage, url or run)
            return [*outcomes[:-1], replace(outcomes[-1], problem=problem)]
    problem = f"does not go on: exit {again.code}: {again.err[-500:]}"
    return [*outcomes[:-1], replace(outcomes[-1], problem=problem, wrong_code=True)]


def _disturbed(world: World, stage: str, fault: Fault, run: Path | str, log: Path, moments: random.Random) -> Outcome:
    """One command under one fault: its exit code, what it said, and, where that is 0, its rows."""
    process = start(*world.command(stage, run), log=log, environment=fault.environment(moments, stage))
    fault.act(process, moments, world.seconds[stage])
    process.join(120)
    if process.is_alive():
        process.kill()
        return Outcome(None, f"hung: {log.read_text()[-500:]}", True)
    code, said = process.exitcode, log.read_text()
    if "Traceback" in said:
        return Outcome(code, said[-2000:], True)
    if code not in fault.codes:
        return Outcome(code, f"exit code {code}: {said[-500:]}", True)
    if code == 0 and (problem := world.check(stage, run)):
        return Outcome(code, f"exit 0, but {problem}", True)
    return Outcome(code, None)


def together(world: World, stage: str, count: int, run: Path) -> Outcome:
    """Several processes with one command on one folder; all must end well, and every row be there once."""
    world.before(stage, run)
    logs = [run.parent / f"{run.name}.{number}.log" for number in range(count)]
    for log in logs:
        log.touch()
    processes = [start(*world.command(stage, run), log=log) for log in logs]
    for process in processes:
        process.join(180)
    codes = [process.exitcode for process in processes]
    bad = [log.read_text()[-500:] for log, code in zip(logs, codes, strict=True) if code != 0]
    if bad:
        return Outcome(codes[0], f"exit codes {codes}: {bad[0]}", True)
    return Outcome(0, world.check(stage, run))
