"""The floors hold, and what holds them can fail: a forbidden import is refused by `make check`."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.architecture import LAZY, PAGE, ROOT, circles, drawing, floors, folder_graph, lazy_imports, lines


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` over a checkout, as `make check` runs it."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_house_has_seven_floors_at_most_and_no_circle() -> None:
    graph = folder_graph()
    assert circles(graph) == []
    assert max(floors(graph).values()) <= 7, lines(graph)


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_imports_inside_functions_are_those_that_are_listed() -> None:
    found: dict[str, set[str]] = {}
    for module, name in lazy_imports():
        found.setdefault(module, set()).add(name)
    assert found == LAZY


def test_the_picture_in_the_docs_is_of_this_code() -> None:
    assert drawing(folder_graph()) in PAGE.read_text(), "python -m tests.architecture --write"


@pytest.mark.parametrize("package", ("audit", "pipelines"))
def test_a_type_checker_sees_every_name_that_is_imported_late(package: str) -> None:
    """Names behind a module's __getattr__ are Any to users' checkers unless they are imported for them as well."""
    for_checkers = {}
    for block in ast.parse((ROOT / package / "__init__.py").read_text()).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for line in block.body:
                assert isinstance(line, ast.ImportFrom)
                for_checkers |= {each.asname: line.module for each in line.names if each.asname == each.name}
    module = importlib.import_module(package)
    assert {name: for_checkers.get(name) for name in module.__all__} == module._API


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (None, "", None),
        ("audit/base/storage.py", "from audit.run import run", "The floors of audit/"),
        ("audit/captions/rows.py", "from audit.index import ann", "The floors of audit/"),
        ("audit/engines/job.py", "def late() -> None:\n    from audit.scores import scan", "The floors of audit/"),
        ("pipelines/formulas.py", "import audit.base.errors", "pipelines/ knows nothing of an audit"),
    ],
)
def test_a_forbidden_import_fails_the_check(tmp_path: Path, file: str | None, line: str, broken: str | None) -> None:
    for name in ("audit", "pipelines"):
        kept = shutil.ignore_patterns("testbed", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=kept)
    (tmp_path / "audit" / "testbed").mkdir()
    shutil.copy(ROOT / "audit/testbed/__init__.py", tmp_path / "audit/testbed/__init__.py")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        path = tmp_path / file
        path.write_text(f"{path.read_text()}\n\n{line}\n")
    done = lint(tmp_path)
    assert (done.returncode == 0) == (broken is None), done.stdout
    if broken is not None:
        assert any(broken in told and "BROKEN" in told for told in done.stdout.splitlines()), done.stdout


def test_every_pin_can_be_had_by_every_python_the_package_takes() -> None:
    """A release that has dropped an old Python is pinned for the newer ones alone."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest = config["options"]["python_requires"].removeprefix(">=")
    checked = 0
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": oldest}):
            needs = importlib.metadata.metadata(pin.name)["Requires-Python"]
            assert not needs or f"{oldest}.0" in SpecifierSet(needs), f"{line}: needs Python {needs}"
            checked += 1
    assert checked > 10
