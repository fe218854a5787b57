"""Files of a model's folder: its JSON, the weight files that are loaded, and their hashes."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError

WEIGHTS = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
"""Names of a part's weights, in the order the libraries look for them; shards are listed in NAME.index.json."""
BOUNDS = (
    (r"layers|blocks_per|num_blocks", 1000),
    (r"sample_size|pos_embed_max_size", 1024),
    (r"num_train_timesteps|steps_offset|max_position_embeddings|solver_order", 100_000),
    (r"extra_ids", 100_000),
    (r"model_max_length|max_length", float("inf")),  # tokenizers without a length say 1e30
)
MOST = 1e9
"""The largest number a configuration may have, by its key and for all others: a library builds what it reads, so that
a billion layers would take all memory before anything could be said."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Extensions of weights that torch unpickles."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one part: which are loaded, of which variant (`fp16`), or None for the plain ones."""

    variant: str | None
    files: tuple[Path, ...]


def choose_weights(files: Iterable[str], part: str, library: str, name: str) -> tuple[str | None, str] | None:
    """The variant and the file, or the index of shards, that a part of these files is loaded from; None: no weights.

    Safetensors before pickles; plain ones before those of the one variant there is.

    Raises:
        ModelError: several variants and no plain ones, or the same weights twice, whole and in shards.
    """
    there = sorted(files)
    for file in WEIGHTS[library]:
        stem, suffix = file.rsplit(".", 1)
        pattern = rf"{stem}(?:\.(\w+))?\.{suffix}|{stem}\.{suffix}\.index(?:\.(\w+))?\.json"
        found: dict[str | None, list[str]] = {}
        for other in there:
            if match := re.fullmatch(pattern, other):
                found.setdefault(match[1] or match[2], []).append(other)
        if not found:
            continue
        variants = sorted(variant for variant in found if variant)
        if None not in found and len(variants) > 1:
            raise ModelError(
                f"{name}: {part}/ has weights of the variants {', '.join(variants)} only: keep one of them"
            )
        variant = None if None in found else variants[0]
        if len(found[variant]) > 1:  # diffusers loads the shards of two such, transformers the whole file
            raise ModelError(
                f"{name}: {part}/ has {' and '.join(found[variant])}, which may differ: keep one of them, "
                "with the shards that are its own"
            )
        return variant, found[variant][0]
    return None


def find_weights(folder: Path, part: str, library: str, name: str) -> Weights:
    """The weight files a part is loaded from, as `choose_weights`.

    Raises:
        ModelError: no weights, as `choose_weights`, or shards that the index names and are not there.
    """
    chosen = choose_weights((file.name for file in (folder / part).glob("*")), part, library, name)
    if chosen is None:
        raise ModelError(f"{name}: {part}/ has no weights ({' or '.join(WEIGHTS[library])}); download the model again")
    variant, file = chosen
    if not file.endswith(".json"):
        return Weights(variant, (folder / part / file,))
    shards = read_shards(folder, f"{part}/{file}", name)
    gone = [shard for shard in shards if not (folder / part / shard).is_file()]
    if gone:
        raise ModelError(
            f"{name}: {part}/ has {len(shards) - len(gone)} of {len(shards)} shards, {gone[0]} is not there; download "
            "the model again"
        )
    return Weights(variant, tuple(folder / part / each for each in (file, *shards)))


def read_shards(folder: Path, index: str, name: str) -> list[str]:
    """The names of the shards an index lists. Raises ModelError: it lists none, or no plain names."""
    listed = read_json(folder, index, name).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(shard, str) and Path(shard).name == shard for shard in names):
        raise ModelError(f"{name}: {index} has no weight_map of files beside it: download the model again")
    return sorted(set(names))


def read_json(path: Path, file: str, name: str) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ModelError: not there, no object, or with a number that no model has (BOUNDS).
    """
    try:
        found = json.loads((path / file).read_text(encoding="utf-8"))
        large = {} if file.endswith(".index.json") else _too_large(found)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {file} cannot be read ({error}): download the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {file} is no JSON object: download the model again")
    for key, most in large.items():
        value = textwrap.shorten(str(found[key]), 40)
        raise ModelError(
            f"{name}: {file} sets {key} to {value}: more than {most:g}, which no model has; download the model again"
        )
    return found


def _too_large(config: Any) -> dict[str, float]:
    """Keys with a number above their bound, and the bound."""
    if not isinstance(config, dict):
        return {}
    bounds = {key: next((most for pattern, most in BOUNDS if re.search(pattern, key)), MOST) for key in config}
    return {key: most for key, most in bounds.items() if _largest(config[key]) > most}


def _largest(value: Any) -> float:
    """The largest absolute number in a JSON value, of those that are finite."""
    if isinstance(value, (list, tuple)):
        return max((_largest(each) for each in value), default=0)
    if isinstance(value, dict):
        return max((_largest(each) for each in value.values()), default=0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return abs(value) if number and value not in (float("inf"), float("-inf")) and value == value else 0


_hashes: dict[tuple[str, int, int, int], str] = {}  # of files as they were: path, size, modified, inode


def file_sha256(file: Path) -> str:
    """sha256 of a file; one that was hashed before in this process, and is the same, is not read again."""
    # the hub's cache links big files to blobs that are named by their sha256
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    facts = file.stat()
    key = (str(file.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    if key not in _hashes:
        total = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(1 << 22):
                total.update(chunk)
        _hashes[key] = total.hexdigest()
    return _hashes[key]
