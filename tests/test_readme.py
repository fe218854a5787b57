"""Every command of the README is run here as it is typed, in an empty folder with the files it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from audit import testbed
from tests.command import be_audit

pytestmark = pytest.mark.processes


README = (Path(__file__).parent.parent / "README.md").read_text()
HUB_MODEL = "CompVis/stable-diffusion-v1-4"
RUN_BY_CI = {"make demo", "make test", "pip install ."}  # .ci/run runs both, and make installs the package


def commands() -> list[str]:
    """Lines of the README's bash blocks, without comments."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captions.parquet, clean.parquet, labels.csv, images/ and the descriptor's file, cut from the testbed."""
    folder = tmp_path_factory.mktemp("readme")
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = table[table.copy_error < 0.15].sort_values("copy_error", kind="stable").head(6)
    unseen = table[table.cluster.str.startswith("unseen")]
    chosen = pd.concat([copied, unseen.head(6)])
    chosen[["URL", "TEXT"]].to_parquet(folder / "captions.parquet")
    unseen.tail(20)[["URL", "TEXT"]].to_parquet(folder / "clean.parquet")
    chosen[["TEXT", "label", "cluster"]].to_csv(folder / "labels.csv", index=False)
    (folder / "images").mkdir()
    for row in pq.read_table(testbed.PICTURES).slice(0, 400).to_pylist():
        (folder / "images" / f"{row['key']}.png").write_bytes(row["image"]["bytes"])
    shutil.copy(testbed.DESCRIPTOR, folder / "sscd_disc_mixup.torchscript.pt")
    return folder


@pytest.mark.timeout(900)
def test_every_command_runs_as_typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach in a test: the one substitution is the testbed for the Stable Diffusion id."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    monkeypatch.chdir(folder)
    ran = list[str]()
    for command in commands():
        if command in RUN_BY_CI:
            continue
        words = shlex.split(command.replace(HUB_MODEL, "testbed"))
        assert words[0] == "be-audit", f"a command no test runs: {command}"
        if words[1] == "scan" and "--dry-run" in words:
            words += ["-o", "other-run"]  # the folder's run is that of the first command
        if ran:
            found = be_audit(*words[1:])
            done = subprocess.CompletedProcess(words, found.code, found.out, found.err)
        else:  # the installed command itself; a process that has imported everything does for the others
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran.append(words[1])
    assert len(ran) == len(set(commands()) - RUN_BY_CI)
    assert (folder / "be-audit-run/report").is_dir() and (folder / "be-audit-score.png").is_file()
    assert not (folder / "other-run").exists()


def test_the_python_example_runs(folder: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(folder / "captions.parquet", tmp_path)
    code += "\nassert summary.exit_code == 0 and len(scores) == 12 and scores.ld.notna().all()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_and_pictures_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (Path(__file__).parent.parent / target).exists(), target
