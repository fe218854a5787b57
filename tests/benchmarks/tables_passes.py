"""What `make tables` samples from the testbed, and the passes through its model: kept in a work folder, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from audit import testbed
from audit.base.progress import Progress
from audit.captions.sample import SAMPLE
from audit.cli.demo import COPIED
from pipelines import FirstStepScorer, find_model, formulas, load
from pipelines.attention import TOKENS, capture_attention, cross_attention_layers, paper_layers
from pipelines.detectors import FirstStep, scores
from pipelines.model import DiffusionModel, Embeddings
from pipelines.schedules import NoiseLevel
from tests.recipe.config import SPRITES
from tests.recipe.sprites import load as load_sprites
from tests.recipe.world import World

COMMON_TEMPLATES = 16  # template-000 to -015 are the common ones (audit/testbed/README.md)
CHUNK = 16
GUIDANCE = 7.5
NULL_SAMPLE, NULL_FROM = 100, slice(100, 320)  # of the captions never seen
MORE, MORE_NULL = 1001, 1002  # seeds of World.sample_general: not those that training or the testbed's table took
NOISES, SEED = 8, 1000  # of the bank: no table rests on one noise, nor on seed 0, which is a lucky one
COLUMNS = ("magnitude", "ld", "ld_energy", "webster", "attention_entropy", "cosine")
EXTRA_COLUMNS = ("cosine_low", "anisotropy")
Arrays = dict[str, np.ndarray]
Made = TypeVar("Made")


def captions_table() -> pd.DataFrame:
    """Distinct captions of the testbed.

    Columns added: copied (measured), common (template), half (0 or 1; whole clusters, balanced over kinds), null (the
    sample that says what is usual to `excess`, with others of `null_captions`: never seen, counted nowhere else).
    """
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT").reset_index(drop=True)
    table["copied"] = table.copy_error < COPIED
    numbers = table.cluster.str.extract(r"(\d+)$")[0].astype(int)
    table["common"] = (table.label == "local") & (numbers < COMMON_TEMPLATES)
    draw = np.random.default_rng(0)
    half: dict[str, int] = {}
    for _, group in table.groupby(["label", "common", "copied"]):
        for place, cluster in enumerate(draw.permutation(sorted(group.cluster.unique()))):
            half[cluster] = place % 2
    table["half"] = table.cluster.map(half)
    others = table.index[table.cluster.str.startswith("unseen")][NULL_FROM]
    table["null"] = table.index.isin(draw.choice(others, NULL_SAMPLE, replace=False))
    return table


def many(per_template: int, num_unseen: int, num_seen: int, num_more: int = 0) -> pd.DataFrame:
    """All global captions, some of every template, captions the model never saw, and captions it saw once.

    Args:
        num_more: captions that it never saw beside those of the testbed, drawn as they were.
    """
    table = captions_table()
    local = [group.iloc[:per_template] for _, group in table[table.label == "local"].groupby("cluster")]
    starts = table.cluster.str.startswith
    rest = [table[table.label == "global"], table[starts("unseen")].iloc[:num_unseen]]
    rest += [table[starts("seen")].iloc[:num_seen], more_unseen(num_more, set(table.TEXT))]
    return pd.concat([*local, *rest]).reset_index(drop=True)


def null_captions(samples: Sequence[pd.DataFrame], count: int = SAMPLE) -> list[str]:
    """As many captions never seen as a scan takes to say what is usual, in none of the samples but as `null`."""
    table = captions_table()
    known = set(table.TEXT).union(*(frame.TEXT for frame in samples))
    own = table[table.null].TEXT.tolist()[:count]
    return own + more_unseen(count - len(own), known, MORE_NULL).TEXT.tolist()


def more_unseen(count: int, known: set[str], seed: int = MORE) -> pd.DataFrame:
    """Captions of the testbed's world under a seed of their own, none of them known, with the columns of the table."""
    world = World(load_sprites(SPRITES))
    drawn = [text for text in dict.fromkeys(world.sample_general(2 * count, seed)[1]) if text not in known][:count]
    clusters = [f"unseen-more-{at:04d}" for at in range(len(drawn))]
    halves = [at % 2 for at in range(len(drawn))]
    facts = {"label": "none", "copied": False, "common": False, "null": False}
    return pd.DataFrame({"TEXT": drawn, "cluster": clusters, "half": halves, **facts})


def choose(per_template: int, num_global: int, num_unseen: int, first: int = 0) -> pd.DataFrame:
    """Some captions of every template, global ones (copied and not copied alike), captions the model never saw.

    Args:
        first: leave out as many of each before: samples with rising `first` have no caption in common.
    """
    table = captions_table()
    of_global, unseen = table[table.label == "global"], table[table.cluster.str.startswith("unseen")]

    def part(rows: pd.DataFrame, count: int) -> pd.DataFrame:
        return rows.iloc[first * count : (first + 1) * count]

    chosen = [part(group, per_template) for _, group in table[table.label == "local"].groupby("cluster")]
    chosen += [part(group, num_global // 2) for _, group in of_global.groupby("copied")]
    return pd.concat([*chosen, part(unseen, num_unseen)]).reset_index(drop=True)


class Passes:
    """Passes of the testbed's model under a bank of noises; each chunk of captions is kept as an .npz and made once.

    A file's name holds the kind of pass and a hash of the captions and of the noise itself; its folder is named by the
    weights, the number of steps and what the formulas give on a fixed input, so that what is kept is never stale.

    Args:
        work: folder of what is kept. steps: of the whole trajectory. noises, seed: of the bank.
    """

    def __init__(self, work: Path, steps: int = 50, noises: int = NOISES, seed: int = SEED) -> None:
        self.steps, self.seed = steps, seed
        self.folder = find_model(str(testbed.PIPELINE))
        key = [self.folder.weights_sha256(), steps, GUIDANCE, _probe()]
        self.work = work / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.work.mkdir(parents=True, exist_ok=True)
        self.model: DiffusionModel = load(self.folder, "cpu", "float32")
        self.bank = self.model.noise_bank(noises, seed)
        self.empty = self.model.encode_empty()
        self.size = self.model.latent_shape[1:]
        self.layers = tuple(cross_attention_layers(self.model.denoiser))
        self.paper = [self.layers.index(name) for name in paper_layers(self.model.denoiser)]
        self._unconditional: dict[tuple[int, float], torch.Tensor] = {}
        self._scorers: dict[tuple[int, bool], FirstStepScorer] = {}

    def over(self, make: Callable[[list[str], int], Made], captions: Iterable[str]) -> list[Made]:
        """A pass under every noise of the bank."""
        return [make(list(captions), noise) for noise in range(len(self.bank))]

    def columns(self, captions: Sequence[str], noise: int, extra: bool = False) -> Arrays:
        """Every first-step column by the product's scorer, [N]; with `extra` those of the extra evaluation alone."""

        def make(chunk: list[str]) -> Arrays:
            found = self._scorer(noise, extra)(chunk)
            return {name: found.scores[name] for name in (EXTRA_COLUMNS if extra else COLUMNS)}

        return self._kept("extra" if extra else "columns", captions, noise, make)

    def difference(self, captions: Sequence[str], noise: int) -> NDArray[np.float32]:
        """Noise differences of the first step, [N, C, H, W]."""
        level = self.model.levels(self.steps)[0]

        def make(chunk: list[str]) -> Arrays:
            return {"difference": self._difference(chunk, noise, level)}

        return self._kept("difference", captions, noise, make)["difference"]

    def first(self, captions: Sequence[str], noise: int) -> Arrays:
        """First step: masks [N, token, layer, H, W], energy [N, H, W]."""
        level = self.model.levels(self.steps)[0]
        return self._kept("first", captions, noise, lambda chunk: self._once(chunk, noise, level))

    def low(self, captions: Sequence[str], noise: int) -> Arrays:
        """Pure noise at the third last timestep: masks alone are of use."""
        level = self.model.levels(self.steps)[max(-3, -self.steps)]
        return self._kept("low", captions, noise, lambda chunk: self._once(chunk, noise, level))

    def few(self, captions: Sequence[str], noise: int, steps: int) -> Arrays:
        """Final step of a trajectory of few steps, as `--steps` sets the sampler: masks."""
        return self._kept(f"steps{steps}", captions, noise, lambda chunk: self._sample(chunk, noise, steps, False))

    def whole(self, captions: Sequence[str], noise: int) -> Arrays:
        """The whole trajectory: masks of the final step, energy_t [N, steps, H, W], eos_t [N, steps], images."""
        return self._kept("whole", captions, noise, lambda chunk: self._sample(chunk, noise, self.steps, True))

    def _kept(self, name: str, captions: Sequence[str], noise: int, make: Callable[[list[str]], Arrays]) -> Arrays:
        parts: list[Arrays] = []
        with Progress(len(captions), "captions", f"{name}, noise {noise}") as progress:
            for start in range(0, len(captions), CHUNK):
                chunk = list(captions[start : start + CHUNK])
                held = hashlib.sha256(json.dumps(chunk).encode() + self.bank[noise].numpy().tobytes())
                file = self.work / f"{name}-{held.hexdigest()[:16]}.npz"
                if not file.exists():
                    temporary = file.with_suffix(".tmp.npz")
                    np.savez(temporary, **make(chunk))
                    temporary.rename(file)
                with np.load(file) as kept:
                    parts.append(dict(kept))
                progress.add(len(chunk))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _uncond(self, noise: int, level: NoiseLevel) -> torch.Tensor:
        """The unconditional prediction of a noise, made once."""
        key = noise, float(level.timestep)
        if key not in self._unconditional:
            self._unconditional[key] = self.model.predict(self.bank[noise : noise + 1], level, self.empty)
        return self._unconditional[key]

    def _scorer(self, noise: int, extra: bool) -> FirstStepScorer:
        """The product's scorer with one noise of the bank."""
        if (noise, extra) not in self._scorers:
            scorer = FirstStepScorer(self.model, steps=self.steps, guidance_scale=GUIDANCE, extra_evaluation=extra)
            scorer.noises = self.bank[noise : noise + 1]
            scorer.uncond = scorer._unconditional(scorer.level)
            scorer.uncond_low = scorer._unconditional(scorer.low_level) if extra else None
            self._scorers[noise, extra] = scorer
        return self._scorers[noise, extra]

    @torch.inference_mode()
    def _difference(self, captions: list[str], noise: int, level: NoiseLevel) -> NDArray[np.float32]:
        prompts, start = self.model.encode(captions), self.bank[noise : noise + 1]
        conditional = self.model.predict(start.expand(len(captions), -1, -1, -1), level, prompts)
        return (conditional - self._uncond(noise, level)).numpy()

    @torch.inference_mode()
    def _once(self, captions: list[str], noise: int, level: NoiseLevel) -> Arrays:
        prompts, start = self.model.encode(captions), self.bank[noise : noise + 1]
        with self._capture(prompts) as masks:
            conditional = self.model.predict(start.expand(len(captions), -1, -1, -1), level, prompts)
        uncond = self._uncond(noise, level)
        return {"masks": masks(), "energy": formulas.energy_map(conditional - uncond).numpy()}

    @torch.inference_mode()
    def _sample(self, captions: list[str], noise: int, steps: int, whole: bool) -> Arrays:
        """DDIM with guidance, attention of every layer and token at the final step."""
        model, prompts, count = self.model, self.model.encode(captions), len(captions)
        levels = model.levels(steps)
        latents = self.bank[noise : noise + 1].repeat(count, 1, 1, 1)
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


def _probe() -> list[str]:
    """What the formulas behind the passes give on a fixed input: another value is another folder."""
    draw = torch.Generator().manual_seed(0)
    difference, uncond, mask = (torch.randn(1, size, 8, 8, generator=draw) for size in (4, 4, 1))
    first = FirstStep.of(difference, uncond, mask[:, 0].abs(), torch.tensor([[0.25, 0.75]]))
    first = replace(first, low=first)
    found = scores(first)
    return [f"{name} {float(found[name]):.4g}" for name in (*COLUMNS, *EXTRA_COLUMNS)]
