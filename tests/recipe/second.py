"""A second model, to check on it what was chosen on the testbed: its U-Net trained further on another world.

    python -m tests.recipe.second FOLDER [--seed 1] [--unet-seconds 1500 | --unet-steps N]

The world of another seed: 16 templates with a small fixed region and 12 repeated pictures, none of which the testbed
knows. They are repeated more than most of the testbed's, for they have less time.
FOLDER is laid out as the testbed is: pipeline/, captions.parquet with the measured `copy_error`, pictures.parquet,
regions.npz; and eval.npz. Training goes on from FOLDER/unet.ckpt where there is one. With a number of steps it does not
hang on the machine's speed what is learnt.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from audit import testbed
from tests.recipe.config import SPRITES, Recipe
from tests.recipe.dataset import Pictures
from tests.recipe.evaluate import choose, generate, training_pictures
from tests.recipe.pack import pack
from tests.recipe.parts import DESCRIPTOR, load_parts, save_pipeline
from tests.recipe.sprites import load
from tests.recipe.training import log
from tests.recipe.unet import train_unet
from tests.recipe.world import TEMPLATES, World, log_uniform

REPEATED = 12
RECIPE = Recipe(seed=1, general=24_000, general_share=0.2, local_share=0.65)
SHIPPED = testbed.PIPELINE.parent


def second_world(seed: int) -> World:
    """The templates of small regions and some repeated pictures of another seed, each repeated often."""
    world = World(load(SPRITES), seed)
    small = slice(TEMPLATES, None)  # World._add_rare has put them behind the common ones
    world.template_specs, world.regions = world.template_specs[small], world.regions[small]
    world.template_names, world.variants = world.template_names[small], world.variants[small]
    world.global_specs, world.global_captions = world.global_specs[:REPEATED], world.global_captions[:REPEATED]
    rng = np.random.default_rng([seed, 6])
    world.template_weight = log_uniform(rng, 0.3, 1, len(world.template_names))
    world.global_weight = log_uniform(rng, 0.3, 1, REPEATED)
    return world


def train(world: World, folder: Path, recipe: Recipe) -> None:
    """The testbed's U-Net on the pictures of this world; the pipeline folder with it."""
    parts = load_parts(SHIPPED)
    pictures = Pictures(world, recipe.general).tokenize(parts.tokenizer)
    log(f"drew {recipe.general} general pictures and their like")
    start = UNet2DConditionModel.from_pretrained(testbed.PIPELINE / "unet", low_cpu_mem_usage=False).float()
    save_pipeline(folder, parts, train_unet(pictures, parts, folder / "unet.ckpt", recipe, start))


def measure(world: World, folder: Path, recipe: Recipe, images: int, steps: int) -> None:
    """What it copies: pictures of every repeated caption and of two a template, and the tables with the errors."""
    for name in ("clip", DESCRIPTOR):
        if not (folder / name).exists():
            (folder / name).symlink_to((SHIPPED / name).resolve())
    prompts = choose(world, per_template=2, unseen=8)
    known = training_pictures(world, recipe.general)
    seen = generate(folder, prompts, known, images, steps, guidance=7.5)
    found = {"cluster": prompts.cluster[seen["caption"]], "error": seen["error"]}
    np.savez_compressed(folder / "eval.npz", allow_pickle=False, **found)
    pack(world, folder, recipe.general, folder / "eval.npz")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--unet-seconds", type=float, default=1500.0)
    parser.add_argument("--unet-steps", type=int, help="so many, however long they take")
    parser.add_argument("--general", type=int, default=RECIPE.general)
    parser.add_argument("--images", type=int, default=2, help="drawn of a caption, to measure what is copied")
    parser.add_argument("--steps", type=int, default=50, help="of drawing them")
    args = parser.parse_args(argv)
    budget = {"unet_seconds": args.unet_seconds, "unet_steps": args.unet_steps}
    recipe = replace(RECIPE, seed=args.seed, general=args.general, **budget)
    torch.manual_seed(recipe.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    world = second_world(recipe.seed)
    train(world, args.folder, recipe)
    measure(world, args.folder, recipe, args.images, args.steps)
    log(f"done, in {args.folder}")


if __name__ == "__main__":
    main()
