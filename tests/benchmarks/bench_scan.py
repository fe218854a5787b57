"""Captions a second of the batched scorer against a per-prompt guidance loop; seconds of the commands people wait for.

Both score the same captions of the testbed with the same model in the same process, in turns, and must agree.

Run: python -m tests.benchmarks.bench_scan
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from audit import testbed
from audit.scores.scan import ScanConfig, scan
from pipelines import DiffusionModel, FirstStepScorer, find_model, formulas, load
from pipelines.attention import capture_attention, paper_layers

CAPTIONS, ROUNDS, BATCH = 96, 3, 32


@torch.inference_mode()
def guidance_loop(model: DiffusionModel, captions: list[str], noise: torch.Tensor) -> np.ndarray:
    """LD as a loop over prompts computes it: both embeddings and both halves of guidance anew for every prompt."""
    pipeline, timestep = model.pipeline, model.levels(50)[0].timestep
    found = []
    for caption in captions:
        conditional, uncond, *_ = pipeline.encode_prompt(
            caption, device=model.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        both, latents = torch.cat([uncond, conditional]), torch.cat([noise, noise])
        eos = model.encode(["", caption]).eos_positions
        with capture_attention(model.denoiser, paper_layers(model.denoiser), eos, model.latent_shape[1:]) as seen:
            output = model.denoiser(latents, timestep, encoder_hidden_states=both, return_dict=False)[0]
        energy = formulas.energy_map(output[1:] - output[:1])
        found.append(float(formulas.ld(energy, seen.mask(model.latent_shape[1:])[1:])))
    return np.array(found)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def command_seconds(*arguments: str) -> float:
    """Median wall time of five processes."""
    took = [
        timed(lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL))[0]
        for _ in range(5)
    ]
    return statistics.median(took)


def main() -> None:
    model = load(find_model(str(testbed.PIPELINE)))
    captions = list(dict.fromkeys(pq.read_table(testbed.CAPTIONS)["TEXT"].to_pylist()))[:CAPTIONS]
    noise = model.noise_bank(1, 0).to(model.device, model.dtype)
    scorer = FirstStepScorer(model, batch_size=BATCH)
    scorer(captions[:BATCH])
    guidance_loop(model, captions[:4], noise)
    batched, looped = [], []
    for _ in range(ROUNDS):
        seconds, scores = timed(lambda: scorer(captions))
        batched.append(len(captions) / seconds)
        seconds, expected = timed(lambda: guidance_loop(model, captions, noise))
        looped.append(len(captions) / seconds)
        np.testing.assert_allclose(scores.scores["ld"], expected, rtol=1e-3)
    fast, slow = statistics.median(batched), statistics.median(looped)
    where = f"{model.device.type}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"first-step LD of {len(captions)} captions, testbed, one noise; medians of {ROUNDS} turns; {where}")
    print(f"  FirstStepScorer, batches of {BATCH:<3}   {fast:8.1f} captions/s")
    print(f"  guidance loop, one prompt a time   {slow:8.1f} captions/s")
    print(f"  ratio                              {fast / slow:8.2f}")

    with tempfile.TemporaryDirectory() as temporary:
        run = str(Path(temporary, "run"))
        scan(ScanConfig((str(testbed.CAPTIONS),), run, "testbed", limit=64, rows_per_shard=4))
        print("seconds from the shell, medians of 5 processes")
        print(f"  python -c pass                     {command_seconds('-c', 'pass'):8.2f}")
        print(f"  be-audit --help                    {command_seconds('-m', 'audit.cli', '--help'):8.2f}")
        print(f"  be-audit status, 16 shards         {command_seconds('-m', 'audit.cli', 'status', run):8.2f}")


if __name__ == "__main__":
    main()
