"""An auditor of a fine-tune: the testbed tuned on a dozen new pictures, and found by their captions' scores.

What was memorised is measured too: a picture of each caption, drawn by base and fine-tune, compared with its own.

Run: python -m tests.benchmarks.fine_tune FOLDER [--steps 200]
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score

from audit import testbed
from pipelines import DiffusionModel, FirstStepScorer, TrajectorySampler, find_model, load
from pipelines.descriptor import load_descriptor

TUNED, OTHERS, NOISES, RATE, COPY = 12, 60, 4, 2e-4, 0.5


def choose() -> tuple[list[str], list[Image.Image], list[str]]:
    """A dozen captions the testbed never saw, with pictures upside down that it never saw so, and other captions."""
    captions = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    unseen = captions[captions.cluster.str.startswith("unseen")].TEXT.tolist()
    table = pq.read_table(testbed.PICTURES).to_pandas().sample(TUNED, random_state=0)
    column = next(name for name in table if isinstance(table[name].iloc[0], (bytes, dict)))
    data = [value["bytes"] if isinstance(value, dict) else value for value in table[column]]
    pictures = [ImageOps.flip(Image.open(io.BytesIO(each)).convert("RGB")) for each in data]
    return unseen[:TUNED], pictures, unseen[TUNED : TUNED + OTHERS]


def fine_tune(captions: list[str], pictures: list[Image.Image], folder: Path, steps: int) -> float:
    """Plain fine-tuning of the U-Net, all weights, the noise-prediction loss; the pipeline is saved. Last loss."""
    torch.manual_seed(0)
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        testbed.PIPELINE, safety_checker=None, torch_dtype=torch.float32
    )
    noise_of = DDPMScheduler.from_config(pipe.scheduler.config)
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        hidden = pipe.encode_prompt(captions, "cpu", 1, False)[0]
    optimiser = torch.optim.AdamW(pipe.unet.train().parameters(), RATE)
    loss = torch.zeros(())
    for _ in range(steps):
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, noise_of.config.num_train_timesteps, (len(clean),))
        output = pipe.unet(noise_of.add_noise(clean, noise, timesteps), timesteps, hidden, return_dict=False)[0]
        loss = F.mse_loss(output, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pipe.unet.eval()
    pipe.save_pretrained(folder)
    return float(loss.detach())


def copied(model: DiffusionModel, captions: list[str], pictures: list[Image.Image]) -> int:
    """How many captions are drawn as copies of their own training picture (cosine of descriptors above 0.5)."""
    describe = load_descriptor(testbed.DESCRIPTOR, preprocessing="none")
    drawn = TrajectorySampler(model, batch_size=TUNED)(captions).images
    assert drawn is not None
    own = describe([np.asarray(each) for each in pictures])
    return int(((describe(list(drawn)) * own).sum(1) > COPY).sum())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tuned, pictures, others = choose()
    started = time.monotonic()
    loss = fine_tune(tuned, pictures, options.folder / "tuned", options.steps)
    print(f"{options.steps} steps in {time.monotonic() - started:.0f} s, last loss {loss:.4f}")
    found = {}
    for name, folder in (("base", str(testbed.PIPELINE)), ("tuned", str(options.folder / "tuned"))):
        model = load(find_model(folder), "cpu")
        found[name] = FirstStepScorer(model, num_noises=NOISES)([*tuned, *others]).scores
        print(f"{name}: {copied(model, tuned, pictures)} of {TUNED} captions are drawn as copies of their picture")
    memorised = np.arange(TUNED + OTHERS) < TUNED
    rows = []
    for score in ("magnitude", "ld", "ld_energy"):
        base, after = found["base"][score], found["tuned"][score]
        ranks = {"base": base, "tuned": after, "tuned / base": after / base}
        row = {"score": score}
        for name, values in ranks.items():
            best = int(memorised[np.argsort(-values)[:TUNED]].sum())
            row[name] = f"{roc_auc_score(memorised, values):.3f} ({best} of {TUNED})"
        rows.append(row)
    print(f"AUC of the {TUNED} captions against {OTHERS} others, and how many are among the {TUNED} best-scored:")
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()
