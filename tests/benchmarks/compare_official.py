"""Scores and time against the authors' code of "Exploring Local Memorization in Diffusion Models via Bright Ending
Attention" (github.com/chenchen-usyd/BE-PRSS), on the testbed under the same noise.

Their code is imported from a clone, in an environment of the libraries of its time. Times are CPU seconds of one
thread, so that other work on the machine enters neither; theirs takes one prompt at a time (median over captions), ours
all of them (median of three turns). No side decodes pictures: the VAE of those libraries is another network.

Run: make compare OFFICIAL=path/to/BE-PRSS, which makes that environment and calls
python -m tests.benchmarks.compare_official CLONE ITS_PYTHON [--captions 8]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from audit import testbed
from pipelines import FirstStepScorer, find_model, load
from pipelines.trajectory import TrajectorySampler

STEPS, GUIDANCE, BATCH = 50, 7.5, 32


def differences(ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[float, float]:
    """Largest absolute difference, and largest relative to theirs; a difference from zero is infinitely large.

    Raises:
        ValueError: other shapes, or a value that is not finite.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} and {theirs.shape}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a value is not finite")
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    size = np.abs(theirs.astype(np.float64))
    relative = np.divide(apart, size, out=np.where(apart == 0, 0.0, np.inf), where=size > 0)
    return float(apart.max()), float(relative.max())


def older_copy(folder: Path) -> None:
    """The testbed as the older libraries read it: the text encoder's weights carry their prefix there.

    `clip_sample` is off as in Stable Diffusion 1's own scheduler; DDIM would turn it on where nothing is said.
    """
    shutil.copytree(testbed.PIPELINE, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "clip_sample": False}))
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def official(clone: Path, python: Path, work: Path, job: dict[str, Any], noise: torch.Tensor) -> dict[str, Any]:
    """What official_scores finds: magnitude and ld, [N, steps], mask, [N, H, W]; seconds of each caption, [N]."""
    older_copy(work / "pipeline")
    np.save(work / "noise.npy", noise.numpy())
    (work / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("official_scores.py")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-W", "ignore", str(script), str(clone), str(work)]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the official code failed in {python}:\n{done.stderr}")
    with np.load(work / "official.npz") as found:
        return dict(found)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Median CPU seconds of three calls, and what the last gave."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        result = work()
        taken.append(time.process_time() - started)
    return statistics.median(taken), result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path)
    parser.add_argument("python", type=Path, help="of the environment their code runs in")
    parser.add_argument("--captions", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(find_model(str(testbed.PIPELINE)), "cpu")
    distinct = list(dict.fromkeys(pq.read_table(testbed.CAPTIONS)["TEXT"].to_pylist()))
    captions = distinct[:: max(1, len(distinct) // options.captions)][: options.captions]
    job = {
        "captions": captions,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "heads": model.denoiser.get_submodule(model.mask_layers[0]).heads,
    }
    with tempfile.TemporaryDirectory() as work:
        theirs = official(options.clone, options.python, Path(work), job, model.noise_bank(1, 0))

    scorer = FirstStepScorer(model, steps=STEPS, guidance_scale=GUIDANCE, batch_size=BATCH)
    sampler = TrajectorySampler(model, steps=STEPS, guidance_scale=GUIDANCE, batch_size=BATCH // 2)
    scorer(captions)  # warm
    first_seconds, first = timed(lambda: scorer(captions))
    seconds, whole = timed(lambda: sampler(captions, decode=False))

    pairs = {
        "magnitude, first step alone": (first.scores["magnitude"], theirs["magnitude"][:, 0]),
        f"magnitude, {STEPS} steps": (whole.magnitude_t, theirs["magnitude"]),
        f"LD, {STEPS} steps": (whole.ld_t, theirs["ld"]),
        "BE mask": (whole.be_mask, theirs["mask"]),
    }
    agreement = []
    for name, (mine, other) in pairs.items():
        absolute, relative = differences(mine, other)
        largest = f"{np.abs(other).max():.3g}"
        agreement.append((name, f"{absolute:.1e}", f"{relative:.1e}", largest))
    times = [
        ("first step", "stopped after its first step", first_seconds, "first"),
        ("first step", "as it runs: the whole pipeline", first_seconds, "whole"),
        (f"{STEPS} steps with mask", "as it runs: two passes", seconds, "masked"),
    ]
    print(f"testbed, {len(captions)} captions, one noise, one thread, no pictures decoded\n")
    head = ["agreement", "largest difference", "largest relative difference", "largest value"]
    print(pd.DataFrame(agreement, columns=head).to_markdown(index=False, disable_numparse=True))
    print()
    rows = []
    for what, how, batch, name in times:
        mine, other = batch / len(captions), float(np.median(theirs[f"seconds_{name}"]))
        rows.append((what, how, f"{mine:.4f}", f"{other:.4f}", f"{other / mine:.1f}"))
    head = ["CPU seconds a caption", "the official code", "be-audit", "official", "times faster"]
    print(pd.DataFrame(rows, columns=head).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
