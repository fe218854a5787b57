"""`be-audit score`: the printed numbers are the scorers' own, the picture is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from audit.cli.commands import cli
from pipelines import FirstStepScorer, TrajectorySampler, find_model, load
from tests.tiny import save_model

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("sd1", tmp_path_factory.mktemp("score") / "model"))


def test_score_prints_what_the_scorers_give_and_draws_the_strip(model: str, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    flags = ["--model", model, "--steps", "4", "--trajectory", "--device", "cpu", "-o", str(picture)]
    done = CliRunner().invoke(cli, ["score", "--prompt", "a $cat$ <b>", *flags])
    assert done.exit_code == 0, done.output
    printed = dict(line.split() for line in done.output.splitlines() if len(line.split()) == 2)
    loaded = load(find_model(model), "cpu")
    first = FirstStepScorer(loaded, steps=4)(["a $cat$ <b>"])
    whole = TrajectorySampler(loaded, steps=4)(["a $cat$ <b>"])
    assert float(printed["ld"]) == pytest.approx(first.scores["ld"][0], rel=1e-4)
    assert float(printed["magnitude"]) == pytest.approx(first.scores["magnitude"][0], rel=1e-4)
    assert float(printed["ld_all"]) == pytest.approx(whole.ld_t.mean(), rel=1e-4)
    drawn = np.asarray(Image.open(picture).convert("RGB"))
    assert drawn.shape[1] > 500 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50


def test_several_noises_are_means_in_every_line(model: str, tmp_path: Path) -> None:
    flags = ["--model", model, "--steps", "4", "--trajectory", "--num-noises", "3", "--device", "cpu"]
    done = CliRunner().invoke(cli, ["score", "--prompt", "a cat", *flags, "-o", str(tmp_path / "x.png")])
    assert done.exit_code == 0, done.output
    printed = dict(line.split() for line in done.output.splitlines() if len(line.split()) == 2)
    whole = TrajectorySampler(load(find_model(model), "cpu"), steps=4, num_noises=3)(["a cat"] * 3, [0, 1, 2])
    assert float(printed["ld_first"]) == pytest.approx(whole.ld_t[:, 0].mean(), rel=1e-4)
    assert float(printed["magnitude_all"]) == pytest.approx(whole.magnitude_t.mean(), rel=1e-4)
    assert float(printed["magnitude"]) == pytest.approx(whole.magnitude_t[:, 0].mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "  "], "--prompt: is empty"),
        (["--prompt", "cat", "--mask-layers", "no.such"], "no.such: the model has no such attention layer to read"),
        (["--prompt", "cat", "--device", "cuda:9"], "this machine has"),
        (["--prompt", "cat", "-o", "/no/such/folder/x.png"], "cannot be written"),
        (["--prompt", "cat", "-o", "x.docx"], "-o x.docx: cannot be written: no kind of picture"),
        (["--prompt", "caf\udce9"], "--prompt: character 4 is not UTF-8"),
        (["--prompt", "cat", "--guidance-scale", "1e38"], "--prompt: scores are not finite: webster inf"),
        (
            ["--prompt", "cat", "--guidance-scale", "1e38", "--trajectory"],
            "--prompt: the decoded picture is not finite",
        ),
    ],
)
def test_mistakes_are_one_line(
    model: str, flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["score", "--model", model, "--steps", "2", *flags])
    assert done.exit_code == 2
    assert says in done.output and "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
