"""Captions of the testbed in two halves, and their first-step noise differences over many noises, a file a noise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from audit import testbed
from audit.base.progress import Progress
from audit.cli.demo import COPIED
from pipelines import find_model, formulas, load

CHUNK = 32
BANK_SEED = 1000  # not the bank any shown run uses


COMMON_TEMPLATES = 16  # template-000 to -015 are the common ones (audit/testbed/README.md)


def halves(per_template: int, num_unseen: int, seed: int = 0) -> pd.DataFrame:
    """Distinct captions: all global ones, some of every template, some the model never saw.

    Columns added: copied (measured), half (0 or 1; whole templates, balanced over kinds).
    """
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    local = table[table.label == "local"].groupby("cluster").head(per_template)
    unseen = table[table.cluster.str.startswith("unseen")].head(num_unseen)
    chosen = pd.concat([table[table.label == "global"], local, unseen]).reset_index(drop=True)
    chosen["copied"] = chosen.copy_error < COPIED
    numbers = chosen.cluster.str.extract(r"(\d+)$")[0].astype(int)
    common = (chosen.label == "local") & (numbers < COMMON_TEMPLATES)
    draw = np.random.default_rng(seed)
    half: dict[str, int] = {}
    for _, group in chosen.assign(common=common).groupby(["label", "common", "copied"]):
        for place, cluster in enumerate(draw.permutation(sorted(group.cluster.unique()))):
            half[cluster] = place % 2
    chosen["half"] = chosen.cluster.map(half)
    return chosen


def energy_maps(captions: list[str], noises: int, work: Path, steps: int = 50) -> np.ndarray:
    """E_T of every caption from the first noises of the bank of seed 1000, [noises, N, H, W], float32."""
    maps = difference_maps(captions, noises, work, steps)
    return np.stack([formulas.energy_map(torch.from_numpy(each)).numpy() for each in maps])


@torch.inference_mode()
def difference_maps(
    captions: list[str], noises: int, work: Path, steps: int = 50, model: Path = testbed.PIPELINE
) -> np.ndarray:
    """Noise differences of the first step, [noises, N, C, H, W], float32; arguments as of `energy_maps`."""
    folder = find_model(str(model))
    key = ["difference", folder.weights_sha256(), BANK_SEED, steps, *captions]
    work = work / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"noise-{number:05d}.npy" for number in range(noises)]
    if not all(file.exists() for file in files):
        loaded = load(folder, "cpu", "float32")
        level, unit, empty = loaded.levels(steps)[0], loaded.unit(steps), loaded.encode_empty()
        prompts = loaded.encode(captions)
        with Progress(noises, "noises", "noise differences") as progress:
            for file, noise in zip(files, loaded.noise_bank(noises, BANK_SEED).split(1), strict=True):
                if not file.exists():
                    uncond = loaded.predict(noise, level, empty)
                    parts = []
                    for rows in torch.arange(len(captions)).split(CHUNK):
                        latents = noise.expand(len(rows), -1, -1, -1)
                        output = loaded.predict(latents, level, prompts.take(rows))
                        parts.append(loaded.difference(output, uncond, level, unit))
                    temporary = file.with_suffix(".tmp.npy")
                    np.save(temporary, torch.cat(parts).numpy())
                    temporary.rename(file)
                progress.add(1)
    return np.stack([np.load(file) for file in files])
