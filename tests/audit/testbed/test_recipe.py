"""The recipe still draws the shipped testbed, and the whole of it runs from nothing to tables."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from audit import testbed

pytestmark = pytest.mark.sampling


CHECKOUT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny tensors: a second thread costs more than it brings
WHOLE_RECIPE = """
import sys
from tests.recipe import evaluate, pack, train

folder, out = sys.argv[1:]
world = ["--general", "60"]
seconds = ["--clip-seconds", "0.1", "--vae-seconds", "0.1", "--unet-seconds", "0.1"]
tiny = [*world, *seconds, "--channels", "32", "32", "32", "--batch", "8"]
train.main(["prepare", folder, *tiny])
train.main(["unet", folder, *tiny, "--common-only"])
train.main(["unet", folder, *tiny])
evaluate.main([folder, out, *world, "--steps", "2", "--images", "1", "--per-template", "1", "--unseen", "4"])
pack.main([folder, *world, "--measured", f"{out}/eval.npz"])
"""


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_world_is_the_one_that_was_trained_on(tmp_path: Path) -> None:
    done = _python("-m", "tests.recipe.pack", str(tmp_path))
    assert done.returncode == 0, done.stderr
    drawn, shipped = pq.read_table(tmp_path / "captions.parquet"), pq.read_table(testbed.CAPTIONS)
    assert drawn.schema.equals(shipped.schema)
    assert drawn.drop_columns("copy_error").equals(shipped.drop_columns("copy_error"))
    with np.load(tmp_path / "regions.npz") as file:
        ours = dict(zip(file["clusters"].tolist(), np.unpackbits(file["regions"], axis=-1).astype(bool), strict=True))
    theirs = testbed.regions()
    assert list(ours) == list(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)

    drawn, shipped = pq.read_table(tmp_path / "pictures.parquet"), pq.read_table(testbed.PICTURES)
    assert drawn.schema.equals(shipped.schema)
    assert drawn.drop_columns("image").equals(shipped.drop_columns("image"))
    for one, other in zip(drawn["image"].to_pylist(), shipped["image"].to_pylist(), strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(image["bytes"]))).astype(int) for image in (one, other))
        assert abs(a - b).max() <= 1  # float rounding differs between processors


def test_the_whole_recipe_runs(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder, out = tmp_path / "testbed", tmp_path / "evaluation"
    done = _python("-c", WHOLE_RECIPE, str(folder), str(out))
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout  # the second U-Net stage took up the first one's checkpoint

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder / "pipeline", torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red apple", num_inference_steps=2).images[0].size == (64, 64)
    descriptor = torch.jit.load(str(folder / "copy_descriptor.torchscript.pt"))
    assert descriptor(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    assert Image.open(out / "sheet.png").size == (16 * 64, 12 * 64)

    captions, pictures = (pq.read_table(folder / f"{name}.parquet") for name in ("captions", "pictures"))
    assert captions.schema.equals(pq.read_schema(testbed.CAPTIONS))
    assert pictures.schema.equals(pq.read_schema(testbed.PICTURES))
    memorised = [row for row in captions.to_pylist() if row["label"] != "none"]
    assert len({row["cluster"] for row in memorised}) == 48 + 32
    assert all(0 < row["copy_error"] < 1 for row in memorised)


def test_a_second_model_memorises_a_world_that_the_testbed_does_not_know(tmp_path: Path) -> None:
    small = ("--general", "60", "--unet-steps", "2", "--images", "1", "--steps", "2")
    done = _python("-m", "tests.recipe.second", str(tmp_path), *small)
    assert done.returncode == 0, done.stderr
    assert "unet: 2 steps" in done.stdout
    table, known = pq.read_table(tmp_path / "captions.parquet").to_pandas(), pq.read_table(testbed.CAPTIONS)
    memorised = table[table.label != "none"]
    assert memorised.groupby("label").cluster.nunique().to_dict() == {"global": 12, "local": 16}
    assert memorised.copy_error.between(0, 1, inclusive="neither").all() and table.copy_error.count() == len(memorised)
    assert not set(memorised.TEXT) & set(known["TEXT"].to_pylist())
    with np.load(tmp_path / "regions.npz") as file:
        regions = np.unpackbits(file["regions"], axis=-1)
    assert len(regions) == 16 and regions.mean((1, 2)).max() < 0.25
    weights = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = ((folder / weights).read_bytes() for folder in (tmp_path / "pipeline", testbed.PIPELINE))
    assert len(ours) == len(theirs) and ours != theirs


def test_a_missing_font_is_said_in_one_line(tmp_path: Path) -> None:
    font = tmp_path / "absent.ttf"
    done = _python("-m", "tests.recipe.sprites", str(tmp_path / "sprites.npz"), "--font", str(font))
    assert done.returncode == 2
    assert f"{font}: no such font" in done.stderr and "fonts-noto-color-emoji" in done.stderr
    assert "Traceback" not in done.stderr
