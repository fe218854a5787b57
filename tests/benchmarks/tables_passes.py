"""What `make tables` samples from the testbed, and the passes through its model: kept in a work folder, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from audit import testbed
from audit.base.progress import Progress
from audit.cli.demo import COPIED
from pipelines import FirstStepScorer, TrajectorySampler, find_model, formulas, load
from pipelines.attention import TOKENS, capture_attention, cross_attention_layers, paper_layers
from pipelines.model import DiffusionModel, Embeddings
from pipelines.schedules import NoiseLevel

COMMON_TEMPLATES = 16  # template-000 to -015 are the common ones (audit/testbed/README.md)
CHUNK = 16
GUIDANCE = 7.5
Arrays = dict[str, np.ndarray]


def choose(per_template: int, num_unseen: int, seed: int = 0) -> pd.DataFrame:
    """Distinct captions: all global ones, some of every template, some the model never saw.

    Columns added: copied (measured), common (template), half (0 or 1; whole templates, balanced over kinds).
    """
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    local = table[table.label == "local"].groupby("cluster").head(per_template)
    unseen = table[table.cluster.str.startswith("unseen")].head(num_unseen)
    chosen = pd.concat([table[table.label == "global"], local, unseen]).reset_index(drop=True)
    chosen["copied"] = chosen.copy_error < COPIED
    numbers = chosen.cluster.str.extract(r"(\d+)$")[0].astype(int)
    chosen["common"] = (chosen.label == "local") & (numbers < COMMON_TEMPLATES)
    draw = np.random.default_rng(seed)
    half: dict[str, int] = {}
    for _, group in chosen.groupby(["label", "common", "copied"]):
        for place, cluster in enumerate(draw.permutation(sorted(group.cluster.unique()))):
            half[cluster] = place % 2
    chosen["half"] = chosen.cluster.map(half)
    return chosen


class Passes:
    """Passes of the testbed's model over the captions; each chunk is kept as an .npz and made once.

    Args:
        frame: from `choose`. work: folder of what is kept. steps: of the whole trajectory.
    """

    def __init__(self, frame: pd.DataFrame, work: Path, steps: int = 50) -> None:
        self.frame, self.steps = frame, steps
        self.folder = find_model(str(testbed.PIPELINE))
        key = [self.folder.weights_sha256(), steps, formulas.FORMULA_VERSION, *frame.TEXT]
        self.work = work / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.work.mkdir(parents=True, exist_ok=True)
        self.model: DiffusionModel = load(self.folder, "cpu", "float32")
        self.noise = self.model.noise_bank(1, 0)
        self.empty = self.model.encode_empty()
        self.size = self.model.latent_shape[1:]
        self.layers = tuple(cross_attention_layers(self.model.denoiser))
        self.paper = [self.layers.index(name) for name in paper_layers(self.model.denoiser)]

    def first(self) -> Arrays:
        """First step: masks [N, token, layer, H, W], energy [N, H, W]."""
        return self._kept("first", lambda captions: self._once(captions, self.model.levels(self.steps)[0]))

    def low(self) -> Arrays:
        """Pure noise at the third last timestep: masks alone are of use."""
        at = max(-3, -self.steps)
        return self._kept("low", lambda captions: self._once(captions, self.model.levels(self.steps)[at]))

    def few(self, steps: int) -> Arrays:
        """Final step of a trajectory of few steps, as `--steps` sets the sampler: masks."""
        return self._kept(f"steps{steps}", lambda captions: self._sample(captions, steps, whole=False))

    def whole(self) -> Arrays:
        """The whole trajectory: masks of the final step, energy_t [N, steps, H, W], eos_t [N, steps], images."""
        return self._kept("whole", lambda captions: self._sample(captions, self.steps, whole=True))

    def _kept(self, name: str, make: Callable[[list[str]], Arrays]) -> Arrays:
        captions = self.frame.TEXT.tolist()
        parts: list[Arrays] = []
        with Progress(len(captions), "captions", name) as progress:
            for start in range(0, len(captions), CHUNK):
                file = self.work / f"{name}-{start:05d}.npz"
                chunk = captions[start : start + CHUNK]
                if not file.exists():
                    temporary = file.with_suffix(".tmp.npz")
                    np.savez(temporary, **make(chunk))
                    temporary.rename(file)
                with np.load(file) as kept:
                    parts.append(dict(kept))
                progress.add(len(chunk))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    @torch.inference_mode()
    def _once(self, captions: list[str], level: NoiseLevel) -> Arrays:
        prompts = self.model.encode(captions)
        latents = self.noise.expand(len(captions), -1, -1, -1)
        with self._capture(prompts) as masks:
            conditional = self.model.predict(latents, level, prompts)
        uncond = self.model.predict(self.noise, level, self.empty)
        return {"masks": masks(), "energy": formulas.energy_map(conditional - uncond).numpy()}

    @torch.inference_mode()
    def _sample(self, captions: list[str], steps: int, whole: bool) -> Arrays:
        """DDIM with guidance, attention of every layer and token at the final step."""
        model, prompts, count = self.model, self.model.encode(captions), len(captions)
        levels = model.levels(steps)
        latents = self.noise.repeat(count, 1, 1, 1)
        both = Embeddings.concatenate([self.empty.expand(count), prompts])
        energy, eos = [], []
        final: np.ndarray | None = None
        for level in levels:
            with ExitStack() as stack:
                last = level is levels[-1]
                masks = stack.enter_context(self._capture(both)) if last else None
                paper = tuple(self.layers[place] for place in self.paper)
                eos_step = capture_attention(model.denoiser, paper if whole else (), both.eos_positions, self.size)
                seen = stack.enter_context(eos_step)
                uncond, conditional = model.predict(torch.cat([latents, latents]), level, both).chunk(2)
                final = masks()[count:] if masks else None
            if whole:
                eos.append(seen.mask(self.size)[count:].mean((1, 2)))
                energy.append(formulas.energy_map(conditional - uncond))
            guided = uncond + GUIDANCE * (conditional - uncond)
            latents = model.step(guided, level, latents)
        assert final is not None
        found: Arrays = {"masks": final}
        if whole:
            found["energy_t"], found["eos_t"] = torch.stack(energy, 1).numpy(), torch.stack(eos, 1).numpy()
            pixels = model.decode(latents).permute(0, 2, 3, 1)
            found["images"] = (pixels * 255).round().to(torch.uint8).numpy()
        return found

    @contextmanager
    def _capture(self, prompts: Embeddings) -> Iterator[Callable[[], np.ndarray]]:
        """Inside: attention of every layer for every token; call it for [B, token, layer, H, W], float16."""
        with ExitStack() as stack:
            seen = [
                stack.enter_context(
                    capture_attention(self.model.denoiser, self.layers, prompts.eos_positions, self.size, token)  # type: ignore[arg-type]
                )
                for token in TOKENS
            ]

            def masks() -> np.ndarray:
                by_token = [
                    torch.stack([formulas.resize_mask(each.masks[name], self.size) for name in self.layers], 1)
                    for each in seen
                ]
                return torch.stack(by_token, 1).half().numpy()

            yield masks

    def seconds(self, count: int = 16, repeats: int = 3) -> dict[str, float]:
        """Measured seconds a caption of the product's own scorers, one noise and one thread: the fastest of some."""
        file = self.work / "seconds.json"
        if file.exists():
            return dict(json.loads(file.read_text()))
        captions = self.frame.TEXT.tolist()[-count:]
        steps = {f"steps{steps}": TrajectorySampler(self.model, steps=steps) for steps in (2, 4, 8)}
        steps["whole"] = TrajectorySampler(self.model, steps=self.steps)
        scorers: dict[str, Callable[[list[str]], Any]] = {
            name: lambda texts, sampler=sampler: sampler(texts, decode=False) for name, sampler in steps.items()
        }
        scorers["first"] = FirstStepScorer(self.model, steps=self.steps)
        scorers["extra"] = FirstStepScorer(self.model, steps=self.steps, extra_evaluation=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        found = {name: min(_time(scorer, captions) for _ in range(repeats)) for name, scorer in scorers.items()}
        torch.set_num_threads(threads)
        found["low"], found["energy"] = found["extra"], found["first"]  # the same evaluations
        file.write_text(json.dumps(found))
        return found


def _time(scorer: Callable[[list[str]], Any], captions: list[str]) -> float:
    started = time.perf_counter()
    scorer(captions)
    return (time.perf_counter() - started) / len(captions)


def detectors(captions: list[str], passes: Passes) -> Arrays:
    """Every first-step column, with the extra evaluation: name -> [N]."""
    file = passes.work / f"detectors-{hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        scorer = FirstStepScorer(passes.model, steps=passes.steps, extra_evaluation=True)
        with Progress(len(captions), "captions", "detectors") as progress:
            found = scorer(captions, progress.add)
        assert found.ld_std is not None
        np.savez(file, ld_std=found.ld_std, **found.scores)
    with np.load(file) as kept:
        return dict(kept)
