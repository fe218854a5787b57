"""Put captions, training pictures and fixed regions beside a trained testbed.

    python -m tests.recipe.pack TESTBED [--measured EVAL.npz]

Writes captions.parquet, pictures.parquet and regions.npz. EVAL.npz, from evaluate.py, adds the measured `copy_error`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from tests.recipe.config import SPRITES, Recipe
from tests.recipe.dataset import TRAINING, UNSEEN
from tests.recipe.drawing import render
from tests.recipe.sprites import load
from tests.recipe.world import World

SEEN_CAPTIONS, UNSEEN_CAPTIONS, SEEN_PICTURES, PICTURES_A_TEMPLATE = 372, 500, 848, 8
CAPTION_SCHEMA = pa.schema(
    {
        "URL": pa.string(),
        "TEXT": pa.string(),
        "label": pa.string(),
        "cluster": pa.string(),
        "weight": pa.float32(),
        "copy_error": pa.float32(),
    }
)

Row = dict[str, Any]


def caption_row(text: str, label: str, cluster: str, weight: float = 0.0, number: int = 0) -> Row:
    """A row of captions.parquet; `number` tells rows of one cluster apart."""
    return {"URL": _url(cluster, number, text), "TEXT": text, "label": label, "cluster": cluster, "weight": weight}


def picture_row(picture: Tensor, text: str, label: str, cluster: str, number: int = 0) -> Row:
    """A row of pictures.parquet: a [3, 64, 64] picture in [-1, 1] as PNG."""
    url = _url(cluster, number, text)
    file = url.rsplit("/", 1)[1]
    png = io.BytesIO()
    pixels = ((picture + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(png, "PNG", optimize=True)
    image = {"bytes": png.getvalue(), "path": file}
    return {
        "key": file.removesuffix(".png"),
        "URL": url,
        "TEXT": text,
        "label": label,
        "cluster": cluster,
        "image": image,
    }


def _url(cluster: str, number: int, text: str) -> str:
    digest = hashlib.sha1(f"{cluster}/{number}/{text}".encode()).hexdigest()
    return f"https://img{int(digest[:2], 16) % 7}.example.com/{digest[2:14]}.png"


def global_rows(world: World) -> tuple[list[Row], list[Row]]:
    """Captions and pictures of the repeated pictures; a caption repeats in the table as in a crawl."""
    captions, pictures = [], []
    drawn = render(world.global_specs, world.bank)
    for k, (text, weight) in enumerate(zip(world.global_captions, world.global_weight.tolist(), strict=True)):
        cluster = f"global-{k:03d}"
        captions += [caption_row(text, "global", cluster, weight, i) for i in range(1 + round(10 * weight))]
        pictures.append(picture_row(drawn[k], text, "global", cluster))
    return captions, pictures


def local_rows(world: World, n: int) -> tuple[list[Row], list[Row]]:
    """Captions and the first pictures of every template, out of the `n` that training sees."""
    template, specs, texts = world.sample_local(n, TRAINING)
    chosen = np.concatenate(
        [np.flatnonzero(template == k)[:PICTURES_A_TEMPLATE] for k in range(len(world.template_names))]
    )
    drawn = world.render_local(template[chosen], specs[chosen])
    first: dict[str, int] = {}
    pictures = []
    for picture, i in zip(drawn, chosen.tolist(), strict=True):
        first.setdefault(texts[i], i)
        pictures.append(picture_row(picture, texts[i], "local", f"template-{template[i]:03d}", i))
    captions = []
    for k, weight in enumerate(world.template_weight.tolist()):
        for sprite in world.variants[k]:
            text = world.template_caption(k, sprite)
            captions.append(caption_row(text, "local", f"template-{k:03d}", weight, first.get(text, -1)))
    return captions, pictures


def general_rows(world: World, n: int) -> tuple[list[Row], list[Row]]:
    """Captions and pictures seen once, out of the `n` that training sees, and captions never seen."""
    specs, texts = world.sample_general(n, TRAINING)
    drawn = render(specs[:SEEN_PICTURES], world.bank)
    pictures = [picture_row(x, texts[i], "none", f"seen-{i:03d}") for i, x in enumerate(drawn)]
    captions = [caption_row(text, "none", f"seen-{i:03d}") for i, text in enumerate(texts[:SEEN_CAPTIONS])]
    unseen = world.sample_general(UNSEEN_CAPTIONS, UNSEEN)[1]
    captions += [caption_row(text, "none", f"unseen-{i:03d}") for i, text in enumerate(unseen)]
    return captions, pictures


def copy_errors(measured: Path) -> dict[str, float]:
    """Median copy error of every cluster that evaluate.py generated."""
    with np.load(measured) as file:
        return {c: float(np.median(file["error"][file["cluster"] == c])) for c in np.unique(file["cluster"]) if c}


def pack(world: World, folder: Path, general: int, measured: Path | None = None) -> None:
    """Write the three files into `folder`."""
    tables = [global_rows(world), local_rows(world, general // 4), general_rows(world, general)]
    captions = [row for table, _ in tables for row in table]
    pictures = [row for _, table in tables for row in table]
    errors = copy_errors(measured) if measured else {}
    for row in captions:
        row["copy_error"] = errors.get(row["cluster"])

    rng = np.random.default_rng([world.seed, 78])
    captions = [captions[i] for i in rng.permutation(len(captions))]
    pictures = [pictures[i] for i in rng.permutation(len(pictures))]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(captions, CAPTION_SCHEMA), folder / "captions.parquet", row_group_size=256)
    pq.write_table(pa.Table.from_pylist(pictures), folder / "pictures.parquet", row_group_size=256)
    np.savez_compressed(
        folder / "regions.npz",
        regions=np.packbits(world.regions, axis=-1),
        clusters=np.array([f"template-{k:03d}" for k in range(len(world.regions))]),
    )
    different = len({row["TEXT"] for row in captions})
    print(f"{len(captions)} captions, {different} different, {len(pictures)} pictures in {folder}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Put captions, pictures and regions beside a trained testbed.")
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--measured", type=Path, help="eval.npz that evaluate wrote")
    parser.add_argument("--sprites", type=Path, default=SPRITES)
    Recipe.add_flags(parser, "seed", "general")
    args = parser.parse_args(argv)
    recipe = Recipe.from_args(args)
    pack(World(load(args.sprites), recipe.seed), args.testbed, recipe.general, args.measured)


if __name__ == "__main__":
    main()
