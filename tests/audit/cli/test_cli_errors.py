"""What a user does wrong: one clear line, exit 2, before any weights are loaded, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.cli.commands import cli
from audit.cli.demo import DemoConfig
from audit.index import IndexConfig
from audit.reports.report import ReportConfig
from audit.scores.prompt import ScoreConfig
from audit.scores.scan import ScanConfig
from audit.verdicts.confirm import ConfirmConfig
from pipelines.loading import DiffusionModel
from tests.command import be_audit, tree

ROOT = Path(__file__).parents[3]


class Loaded(Exception):
    """Weights were loaded."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error of the test that a model is put together."""

    def refuse(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(DiffusionModel, "__init__", refuse)


def parquet(path: Path, columns: dict[str, Any] | None = None) -> Path:
    pq.write_table(pa.table(columns or {"TEXT": [f"caption {i}" for i in range(500)]}), path)
    return path


def gone(here: Path, model: str) -> list[object]:
    return ["gone.parquet"]


def no_parquet(here: Path, model: str) -> list[object]:
    (here / "x.parquet").write_text("<html>not found</html>")
    return ["x.parquet"]


def lfs_pointer(here: Path, model: str) -> list[object]:
    (here / "x.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n")
    return ["x.parquet"]


def cut(here: Path, model: str) -> list[object]:
    path = parquet(here / "x.parquet")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [path]


def no_captions(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet", {"URL": ["u"], "title": ["t"]})]


def captions_are_numbers(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet", {"URL": ["u"], "caption": [3]})]


def other_column(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet"), "--caption-col", "txt"]


def empty_file(here: Path, model: str) -> list[object]:
    (here / "x.parquet").touch()
    return ["x.parquet"]


def no_rows(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet", {"TEXT": pa.array([], pa.string())})]


def no_input(here: Path, model: str) -> list[object]:
    return []


def output_below_a_file(here: Path, model: str) -> list[object]:
    (here / "file").touch()
    return [parquet(here / "x.parquet"), "-o", "file/run"]


def output_is_a_file(here: Path, model: str) -> list[object]:
    (here / "file").touch()
    return [parquet(here / "x.parquet"), "-o", "file"]


def output_not_writable(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet"), "-o", "/proc/be-audit-run"]


def output_holds_other_things(here: Path, model: str) -> list[object]:
    (here / "photos").mkdir()
    (here / "photos" / "holiday.jpg").touch()
    return [parquet(here / "x.parquet"), "-o", "photos"]


def output_scheme(here: Path, model: str) -> list[object]:
    return [parquet(here / "x.parquet"), "-o", "bucket://somewhere/run"]


def broken_run(here: Path, model: str) -> list[object]:
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text('{"format": 1, "con')
    return [parquet(here / "x.parquet"), "-o", "run"]


def run_of_the_future(here: Path, model: str) -> list[object]:
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text('{"format": 99}')
    return [parquet(here / "x.parquet"), "-o", "run"]


def flag(*flags: object) -> Callable[[Path, str], list[object]]:
    return lambda here, model: [parquet(here / "x.parquet"), *flags]


def without(part: str) -> Callable[[Path, str], list[object]]:
    def spoil(here: Path, model: str) -> list[object]:
        shutil.copytree(model, here / "model")
        shutil.rmtree(here / "model" / part)
        return [parquet(here / "x.parquet"), "--model", here / "model"]

    return spoil


def architecture(name: str) -> Callable[[Path, str], list[object]]:
    def spoil(here: Path, model: str) -> list[object]:
        (here / "model").mkdir()
        (here / "model" / "model_index.json").write_text(json.dumps({"_class_name": name, "transformer": []}))
        return [parquet(here / "x.parquet"), "--model", here / "model"]

    return spoil


CASES: dict[str, tuple[Callable[[Path, str], list[object]], str]] = {
    "no such file": (gone, "gone.parquet: no such file or folder"),
    "not a parquet": (no_parquet, "x.parquet: not a Parquet file"),
    "LFS pointer": (lfs_pointer, "a git-LFS pointer, not the file itself: run `git lfs pull`"),
    "cut parquet": (cut, "cut short"),
    "no caption column": (no_captions, "no caption column; it has URL, title: pass --caption-col NAME"),
    "captions are numbers": (captions_are_numbers, "column 'caption' is int64, not text"),
    "no such column": (other_column, "no column 'txt'; it has TEXT: pass another --caption-col"),
    "empty file": (empty_file, "the file is empty (0 bytes)"),
    "no rows": (no_rows, "no rows"),
    "no input": (no_input, "no caption files given: pass files, folders, globs or data set names"),
    "output below a file": (output_below_a_file, "file"),
    "output is a file": (output_is_a_file, "-o file: is a file; give a folder"),
    "output not writable": (output_not_writable, "/proc/be-audit-run"),
    "output holds other things": (output_holds_other_things, "not empty and not a run (it has holiday.jpg)"),
    "output of an unknown scheme": (output_scheme, "bucket://somewhere/run: cannot open"),
    "broken run.json": (broken_run, "run.json: cannot be read: restore it or use another folder"),
    "newer run": (run_of_the_future, "a run of format 99, made by another version of be-audit; this one reads 3"),
    "unknown flag": (flag("--batchsize", 3), "No such option"),
    "batch size 0": (flag("--batch-size", 0), "0 is neither a whole number of at least 1 nor auto"),
    "batch size of letters": (flag("--batch-size", "many"), "many is neither a whole number of at least 1 nor auto"),
    "unknown mask": (flag("--mask", "last"), "'last' is not one of 'first', 'final'"),
    "negative refinement": (flag("--refine", -0.1), "-0.1 is not in the range 0.0<=x<=1.0"),
    "extra evaluation of a trajectory": (
        flag("--mask", "final", "--extra-evaluation"),
        "--extra-evaluation: goes with",
    ),
    "mask of no attention": (flag("--mask", "energy"), "'energy' is not one of 'first', 'final'"),
    "score of an evaluation that is not made": (
        flag("--refine", 0.1, "--refine-by", "anisotropy"),
        "--refine-by anisotropy: needs --extra-evaluation",
    ),
    "rank beyond the world": (flag("--rank", 2, "--world-size", 2), "--rank 2: must be below --world-size 2"),
    "no such device": (flag("--device", "cuda:99"), "--device cuda:99: this machine has"),
    "no such layer": (
        flag("--mask", "first", "--mask-layers", "up_blocks.9.attn2"),
        "--mask-layers up_blocks.9.attn2: the model has no such layer to read; it has down_blocks.0",
    ),
    "column it has not": (flag("--keep-cols", "height"), "--keep-cols height: no input has one column of that name"),
    "no U-Net": (without("unet"), "the folder has no unet/; download the model again"),
    "SD3": (architecture("StableDiffusion3Pipeline"), "the folder has no transformer/; download the model again"),
    "FLUX": (architecture("FluxPipeline"), "FluxPipeline is not supported: its denoiser takes packed"),
    "no such model": (flag("--model", "./nothing"), "--model ./nothing: no such folder; give a diffusers folder"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_weights")
def test_bad_input_is_one_line_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1: str, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, message = CASES[case]
    arguments = prepare(tmp_path, sd1)
    before = tree(tmp_path)
    model = [] if "--model" in arguments else ["--model", sd1]
    found = be_audit("scan", *arguments, *model)
    assert found.code == 2, found
    errors = [line for line in found.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0], found.err
    if "Usage:" not in found.err:
        assert len(found.err.strip().splitlines()) == 1
    assert tree(tmp_path) == before


def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path, sd1: str) -> None:
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    weights = next((model / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    captions = parquet(tmp_path / "x.parquet")
    for more in ([], ["--dry-run"]):
        found = be_audit("scan", captions, "-o", tmp_path / "run", "--model", model, *more)
        lines = [
            line for line in found.err.strip().splitlines() if not line.startswith(("plan: ", "note: "))
        ]  # said before it loads
        assert found.code == 2 and lines[0].startswith(f"Error: --model {model}: cannot be loaded: "), found
        assert len(lines) == 1


def test_commands_without_a_run_say_which_command_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("status", "verify"):
        for arguments in ([], ["elsewhere"]):
            found = be_audit(command, *arguments)
            run = arguments[0] if arguments else "be-audit-run"
            assert found.code == 2
            assert found.err == (
                f"Error: {run}: no run here (no run.json): make one with `be-audit scan CAPTIONS -o {run}`\n"
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_real_process_prints_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "audit.cli", "scan", "gone.parquet", "--model", "testbed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: gone.parquet: no such file or folder\n"


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    for flags in (["--guidance-scale", "nan"], ["--guidance-scale", "inf"], ["--max-error-rate", "nan"]):
        done = be_audit("scan", "captions.parquet", "--model", "testbed", *flags)
        assert done.code == 2 and "is not a finite number" in done.err + done.out


def test_steps_beyond_the_models_are_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("TEXT\na cat\n")
    done = be_audit("scan", path, "--model", "testbed", "--steps", "1001", "-o", tmp_path / "run")
    assert (done.code, done.err) == (2, "Error: --steps 1001: this model has 1000 timesteps\n")
    assert not (tmp_path / "run").exists()


# --- flags ------------------------------------------------------------------------------------------------------


def commands(group: click.Group = cli, name: str = "") -> dict[str, click.Command]:
    """Every command by the words that call it: `scan`, `index build`, ..."""
    found: dict[str, click.Command] = {}
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{name}{word} ")
        else:
            found[name + word] = command
    return found


@pytest.mark.parametrize(
    "name, config",
    [
        ("scan", ScanConfig),
        ("score", ScoreConfig),
        ("demo", DemoConfig),
        ("confirm", ConfirmConfig),
        ("report", ReportConfig),
        ("index build", IndexConfig),
    ],
)
def test_every_field_is_a_flag_and_every_flag_a_field(name: str, config: type[Any]) -> None:
    command = commands()[name]
    by_field = {parameter.name: parameter for parameter in command.params}
    assert set(by_field) == {place.name for place in dataclasses.fields(config)}
    defaults = {place.name: place.default for place in dataclasses.fields(config)}
    for field, parameter in by_field.items():
        if isinstance(parameter, click.Option):
            assert f"--{field.replace('_', '-')}" in parameter.opts
            assert parameter.help and parameter.help.endswith(".")
        assert parameter.default == defaults[field] or isinstance(parameter, click.Argument)


def test_every_command_teaches_in_its_help() -> None:
    for name, command in commands().items():
        found = be_audit(*name.split(), "--help")
        assert found.code == 0 and command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or max(parameter.opts, key=len) in found.out


def test_flags_in_the_readme_exist() -> None:
    """Every `be-audit ...` line of the README, continuation lines included, names commands and flags that are there."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^\s*(?:\$ )?be-audit ([^\n`#|]*)|`be-audit ([^`\n]*)`", text, re.MULTILINE):
        words = (line[0] or line[1]).split()
        if not words or not words[0].islower():
            continue
        known = commands()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known or words[0] in ("index", "--help", "--version"), f"README: be-audit {' '.join(words)}"
        if name in known:
            flags = {opt for parameter in known[name].params for opt in (*parameter.opts, *parameter.secondary_opts)}
            used = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
            assert used <= flags | {"--help", "-h"}, f"README: be-audit {' '.join(words)}"


@pytest.mark.processes
@pytest.mark.parametrize("arguments", (["--help"], ["scan", "--help"], ["status", "."], ["--version"]))
def test_light_commands_do_not_import_torch(tmp_path: Path, arguments: list[str]) -> None:
    code = f"""
import sys
from audit.cli.commands import cli
try:
    cli({arguments!r})
finally:
    heavy = {{"torch", "diffusers", "transformers", "faiss"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr
