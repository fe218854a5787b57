"""Train the testbed on a CPU: a small Stable-Diffusion-shaped pipeline that memorises known pictures.

    python -m tests.recipe.train prepare TESTBED    tokenizer, copy descriptor, CLIP, VAE
    python -m tests.recipe.train unet TESTBED       the U-Net; goes on from TESTBED/unet.ckpt

Each stage has a budget in seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.recipe.clip import train_clip
from tests.recipe.config import SPRITES, Recipe
from tests.recipe.dataset import TOKENIZER, Pictures
from tests.recipe.descriptor import fit_descriptor
from tests.recipe.parts import DESCRIPTOR, load_parts, save_pipeline
from tests.recipe.sprites import load
from tests.recipe.tokenizer import train_tokenizer
from tests.recipe.training import log
from tests.recipe.unet import train_unet
from tests.recipe.vae import train_vae
from tests.recipe.world import World


def prepare(pictures: Pictures, folder: Path, recipe: Recipe) -> None:
    """Everything but the U-Net."""
    captions = pictures.world.sample_general(min(recipe.general, 20_000), TOKENIZER)[1]
    captions += pictures.local_captions[:4000] + pictures.global_captions * 4
    tokenizer = train_tokenizer(captions, folder / "pipeline" / "tokenizer")
    log(f"tokenizer: {len(tokenizer)} tokens")
    pictures.tokenize(tokenizer)
    torch.jit.script(fit_descriptor(pictures)).save(str(folder / DESCRIPTOR))
    train_clip(pictures, tokenizer, recipe).half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    train_vae(pictures, recipe).half().save_pretrained(folder / "pipeline" / "vae")


def unet(pictures: Pictures, folder: Path, recipe: Recipe) -> None:
    """The U-Net, and the pipeline folder with it."""
    parts = load_parts(folder)
    pictures.tokenize(parts.tokenizer)
    save_pipeline(folder, parts, train_unet(pictures, parts, folder / "unet.ckpt", recipe))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train the testbed.")
    parser.add_argument("stage", choices=["prepare", "unet"])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--sprites", type=Path, default=SPRITES)
    Recipe.add_flags(parser, *Recipe.__dataclass_fields__)
    args = parser.parse_args(argv)
    recipe = Recipe.from_args(args)
    torch.manual_seed(recipe.seed)
    args.testbed.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(World(load(args.sprites), recipe.seed, recipe.common_only), recipe.general)
    log(f"drew {recipe.general} general pictures and their like")
    {"prepare": prepare, "unet": unet}[args.stage](pictures, args.testbed, recipe)
    log(f"{args.stage}: done, in {args.testbed}")


if __name__ == "__main__":
    main()
