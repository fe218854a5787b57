"""Measure a trained testbed: what it copies, and what each score and mask sees of it.

    python -m tests.recipe.evaluate TESTBED OUT

Prints tables, writes OUT/eval.npz (a row an image; pack.py reads it) and OUT/sheet.png (generated pictures, their
nearest training pictures, BE masks and score-difference maps).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from audit.statistics.metrics import auc, pixel_auc
from tests.recipe.config import SPRITES, Recipe
from tests.recipe.dataset import TRAINING, UNSEEN, tokenize
from tests.recipe.descriptor import imagenet_normalise
from tests.recipe.drawing import SIZE, render
from tests.recipe.parts import DESCRIPTOR, NOISE, load_parts
from tests.recipe.reference import EosAttention, localised, sample, smooth, tpr_at
from tests.recipe.sprites import load
from tests.recipe.training import log
from tests.recipe.world import VARIANTS, World

COPIED = 0.15  # copy error of a copy that anyone sees
MATCH = 0.5  # SSCD's threshold
NOISE_SEED = 123
INDEX_GENERAL, INDEX_LOCAL = 1400, 600  # training pictures searched for the nearest
WEIGHTS = (0, 0.02, 0.06, 0.12, 0.3, 2)
BATCH = 32
SHEET_COLUMNS = 16


@dataclass
class Prompts:
    """Captions with what is known of each; `own` and `where` only cover the memorised ones, which come first."""

    captions: list[str]
    label: np.ndarray  # [N]: global, local or none
    cluster: np.ndarray  # [N] str, "" for none
    weight: np.ndarray  # [N]
    own: Tensor  # [M, 3, 64, 64]: the repeated picture, in [-1, 1]
    where: Tensor  # [M, 64, 64] float: the part of it that repeats


def choose(world: World, per_template: int, unseen: int) -> Prompts:
    """Every repeated picture's caption, some of every template's, and captions never seen."""
    rng = np.random.default_rng([world.seed, 77])
    template = np.repeat(np.arange(len(world.template_names)), per_template)
    variant = np.concatenate([rng.choice(VARIANTS, per_template, replace=False) for _ in world.template_names])
    sprites = world.variants[template, variant]
    local = [world.template_caption(t, s) for t, s in zip(template, sprites, strict=True)]
    none = world.sample_general(unseen, UNSEEN)[1]
    n = len(world.global_captions)
    return Prompts(
        captions=world.global_captions + local + none,
        label=np.repeat(["global", "local", "none"], [n, len(local), unseen]),
        cluster=np.array(
            [f"global-{k:03d}" for k in range(n)] + [f"template-{t:03d}" for t in template] + [""] * unseen
        ),
        weight=np.concatenate([world.global_weight, world.template_weight[template], np.zeros(unseen)]),
        own=torch.cat([render(world.global_specs, world.bank), render(world.template_specs[template], world.bank)]),
        where=torch.cat([torch.ones(n, SIZE, SIZE), torch.as_tensor(world.regions[template]).float()]),
    )


def training_pictures(world: World, general: int) -> Tensor:
    """The first pictures of each kind that training saw, [N, 3, 64, 64] in [-1, 1]."""
    specs, _ = world.sample_general(general, TRAINING)
    template, local, _ = world.sample_local(general // 4, TRAINING)
    first = slice(INDEX_LOCAL)
    return torch.cat(
        [
            render(specs[:INDEX_GENERAL], world.bank),
            world.render_local(template[first], local[first]),
            render(world.global_specs, world.bank),
        ]
    )


def copy_error(pictures: Tensor, own: Tensor, where: Tensor) -> Tensor:
    """Root mean square pixel difference, pictures counted in [0, 1], inside the part that repeats: [B]."""
    squared = (((pictures - own) / 2) ** 2).mean(1)
    return ((squared * where).sum((1, 2)) / where.sum((1, 2))).sqrt()


@torch.no_grad()
def generate(
    folder: Path, prompts: Prompts, known: Tensor, images: int, steps: int, guidance: float
) -> dict[str, np.ndarray]:
    """Sample `images` pictures a caption and measure each; every array has a row an image, captions outermost."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    parts = load_parts(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline" / "unet", low_cpu_mem_usage=False).float().eval()
    scheduler = DDIMScheduler(**NOISE, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(steps)
    descriptor = torch.jit.load(str(folder / DESCRIPTOR))
    attention = EosAttention(unet)

    def describe(x: Tensor) -> Tensor:
        return descriptor(imagenet_normalise(x))

    index = torch.cat([describe(x) for x in known.split(500)])
    ids = tokenize(parts.tokenizer, prompts.captions)
    eos = (ids == parts.tokenizer.eos_token_id).int().argmax(1)
    empty = parts.text(tokenize(parts.tokenizer, [""])).last_hidden_state
    noise = torch.randn(images, 4, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(NOISE_SEED))
    rows = torch.cartesian_prod(torch.arange(len(prompts.captions)), torch.arange(images))
    found: dict[str, list[Tensor]] = {}
    for batch in rows.split(BATCH):
        i, g = batch.unbind(1)
        condition = parts.text(ids[i]).last_hidden_state
        run = sample(unet, scheduler, attention, noise[g], condition, empty.expand(len(i), -1, -1), eos[i], guidance)
        pictures = parts.vae.decode(run.latents / parts.vae.config.scaling_factor).sample.clamp(-1, 1)
        sscd, nearest = (describe(pictures) @ index.T).max(1)
        apart = (sscd < MATCH).float()
        difference = (pictures - known[nearest]) / 2
        mask = F.interpolate(run.final.mean(1, keepdim=True), size=(SIZE, SIZE), mode="bilinear")
        error = torch.ones(len(i))
        memorised = i < len(prompts.own)
        error[memorised] = copy_error(pictures[memorised], prompts.own[i[memorised]], prompts.where[i[memorised]])
        measured = {
            "caption": i,
            "error": error,
            "sscd": sscd,
            "nearest": nearest,
            "s": -apart * difference.flatten(1).norm(dim=1),
            "ls": -apart * (difference * mask).flatten(1).norm(dim=1),
            "energy": run.energy,
            "first": run.first,
            "final": run.final,
            "picture": pictures,
        }
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
        log(f"generated {sum(len(x) for x in found['error'])} of {len(rows)}")
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def scores(seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score of the table, higher means memorised, [N] each."""
    energy = seen["energy"]
    final, first = seen["final"].mean(1), seen["first"].mean(1)
    start, end = energy[:, 0], energy[:, -1]
    magnitude = np.sqrt(energy.sum((-2, -1)))
    ld = localised(final[:, None], energy)
    return {
        "magnitude, first step": magnitude[:, 0],
        "LD, first step, final BE mask": ld[:, 0],
        "LD, first step, first-step EOS mask": localised(first, start),
        "LD, first step, score map of the end": localised(end, start),
        "LD, first step, smoothed energy": localised(smooth(start), start),
        "magnitude, 10 steps": magnitude[:, :10].mean(1),
        "magnitude, all steps": magnitude.mean(1),
        "LD, 10 steps": ld[:, :10].mean(1),
        "LD, all steps": ld.mean(1),
        "SSCD to the nearest": seen["sscd"],
        "S": seen["s"],
        "LS": seen["ls"],
        "LS / mean(m)": seen["ls"] / final.mean((-2, -1)),
    }


def print_copying(label: np.ndarray, weight: np.ndarray, seen: dict[str, np.ndarray]) -> None:
    """How much is copied, by repetition weight."""
    for kind in ("global", "local"):
        for low, high in pairwise(WEIGHTS):
            rows = (label == kind) & (weight >= low) & (weight < high)
            if rows.any():
                error, sscd = seen["error"][rows], np.median(seen["sscd"][rows])
                copied = (error < COPIED).mean()
                print(
                    f"{kind:6} weight {low} to {high}: {rows.sum()} images, copied {copied:.2f}, SSCD median {sscd:.2f}"
                )
    unseen = seen["sscd"][label == "none"]
    middle, high = np.quantile(unseen, [0.5, 0.95])
    print(f"unseen: SSCD median {middle:.2f}, 95 % {high:.2f}, over {MATCH} {(unseen > MATCH).mean():.3f}")


def print_detection(label: np.ndarray, seen: dict[str, np.ndarray]) -> None:
    """ROC AUC and TPR at 1 % FPR of copied images against unseen captions."""
    copied = seen["error"] < COPIED
    for name, score in scores(seen).items():
        cells = []
        for kind in ("local", "global"):
            rows = (label == kind) & copied
            if rows.any():
                kept = rows | (label == "none")
                tpr = tpr_at(score[rows], score[label == "none"])
                cells.append(f"{kind} AUC {auc(score[kept], rows[kept]):.3f} T@1%F {tpr:.3f}")
        print(f"{name:38} {' | '.join(cells)}")


def print_localisation(world: World, prompts: Prompts, seen: dict[str, np.ndarray]) -> None:
    """Pixel AUC of every mask against the true region, mean over the images of common and of rare templates."""
    rows = np.flatnonzero(prompts.label[seen["caption"]] == "local")
    template = np.array([int(c.rsplit("-", 1)[1]) for c in prompts.cluster[seen["caption"][rows]]])
    latent = SIZE // 4
    region = world.regions[template].reshape(-1, latent, 4, latent, 4).mean((2, 4)) > 0.5
    start, end = seen["energy"][:, 0], seen["energy"][:, -1]
    masks = {f"BE mask, layer {k}": seen["final"][:, k] for k in range(seen["final"].shape[1])}
    masks |= {"BE mask": seen["final"].mean(1), "first-step EOS mask": seen["first"].mean(1)}
    masks |= {"first-step energy": start, "first-step energy, smoothed": smooth(start), "score map of the end": end}
    common = template < len(world.template_names) // 2
    for name, mask in masks.items():
        pixel = np.array([pixel_auc(m, r) for m, r in zip(mask[rows], region, strict=True)])
        print(f"{name:28} pixel AUC: common {pixel[common].mean():.2f}, rare {pixel[~common].mean():.2f}")


def save_sheet(path: Path, label: np.ndarray, known: Tensor, seen: dict[str, np.ndarray]) -> None:
    """For each kind of caption a strip of pictures, nearest training pictures, BE masks and maps of the last step."""

    def strip(pictures: np.ndarray) -> np.ndarray:
        return np.concatenate([((p + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0) for p in pictures], 1)

    def heat(maps: np.ndarray) -> np.ndarray:
        low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        grey = np.kron((maps - low) / (high - low + 1e-9) * 2 - 1, np.ones((1, 4, 4)))
        return strip(np.repeat(grey[:, None], 3, 1))

    strips = []
    for kind in ("global", "local", "none"):
        all_rows = np.flatnonzero(label == kind)
        rows = all_rows[np.linspace(0, len(all_rows) - 1, SHEET_COLUMNS).astype(int)]
        nearest = known[seen["nearest"][rows]].numpy()
        maps = heat(seen["final"][rows].mean(1)), heat(seen["energy"][rows, -1])
        strips += [strip(seen["picture"][rows]), strip(nearest), *maps]
    Image.fromarray(np.concatenate(strips)).save(path)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure a trained testbed.")
    parser.add_argument("testbed", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sprites", type=Path, default=SPRITES)
    parser.add_argument("--per-template", type=int, default=2, help="captions of a template")
    parser.add_argument("--unseen", type=int, default=120, help="captions never seen")
    parser.add_argument("--images", type=int, default=2, help="of a caption")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    Recipe.add_flags(parser, "seed", "general")
    args = parser.parse_args(argv)
    recipe = Recipe.from_args(args)
    world = World(load(args.sprites), recipe.seed)
    prompts = choose(world, args.per_template, args.unseen)
    known = training_pictures(world, recipe.general)
    seen = generate(args.testbed, prompts, known, args.images, args.steps, args.guidance)
    label, weight = prompts.label[seen["caption"]], prompts.weight[seen["caption"]]
    print_copying(label, weight, seen)
    print_detection(label, seen)
    print_localisation(world, prompts, seen)
    args.out.mkdir(parents=True, exist_ok=True)
    cluster = prompts.cluster[seen["caption"]]
    rows = {"cluster": cluster, "label": label, "weight": weight, "error": seen["error"]} | scores(seen)
    np.savez_compressed(args.out / "eval.npz", allow_pickle=False, **rows)
    save_sheet(args.out / "sheet.png", label, known, seen)


if __name__ == "__main__":
    main()
