"""be-audit as a user runs it: in this process for its exit code and words, or in one of its own to be killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from click.testing import CliRunner


@dataclass
class Result:
    """How a command ended: exit code and what it printed."""

    code: int
    out: str
    err: str


def be_audit(*arguments: object) -> Result:
    """Run a command in this process. What a user would see as a traceback is raised."""
    from audit.cli.commands import cli

    found = CliRunner().invoke(
        cli, [str(argument) for argument in arguments], prog_name="be-audit", catch_exceptions=False
    )
    return Result(found.exit_code, found.stdout, found.stderr)


def start(*arguments: object, log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start a command in a process of its own, whose imports are done already (it is forked from a server that did).

    Signals reach it as they reach any process. `log` takes what it prints; `environment` is added to its own: FAULT and
    LINKS are tests/faults/inject.py's, SILENCE the seconds after which a silent worker is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.command_imports"])
    here = os.getcwd()
    os.chdir(Path(__file__).parents[1])  # where the server finds what it imports; it is silent about what it does not
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(here)
    words = [str(argument) for argument in arguments]
    process = context.Process(target=_main, args=(words, str(log), dict(environment or {})))
    process.start()
    return process


def _main(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        _run(arguments, log, environment)
    except KeyboardInterrupt:  # before the command listens, as the console script has it
        sys.exit(130)


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    import torch

    from audit.cli.commands import cli

    torch.set_num_threads(1)
    if {"FAULT", "LINKS"} & set(environment):
        from tests.faults.inject import install

        install()
    if "SILENCE" in environment:
        from audit.engines import processes

        processes.SILENCE = float(environment["SILENCE"])
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    cli(arguments)


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder, with bytes and times: to show that nothing was touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
