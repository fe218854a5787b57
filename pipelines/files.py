"""Files of a model's folder: its JSON, the weight files that are loaded, and their hashes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError

WEIGHTS = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
"""Names of a part's weights, in the order the libraries look for them; shards are listed in NAME.index.json."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Extensions of weights that torch unpickles."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one part: which are loaded, of which variant (`fp16`), or None for the plain ones."""

    variant: str | None
    files: tuple[Path, ...]


def find_weights(folder: Path, part: str, library: str, name: str) -> Weights:
    """The weight files a part is loaded from: plain ones, else those of the one variant there is.

    Raises:
        ModelError: no weights, several variants and no plain ones, or shards that the index names and are not there.
    """
    there = sorted(file.name for file in (folder / part).glob("*"))
    for file in WEIGHTS[library]:
        stem, suffix = file.rsplit(".", 1)
        patterns = (rf"{stem}(?:\.(\w+))?\.{suffix}", rf"{stem}\.{suffix}\.index(?:\.(\w+))?\.json")
        found = {
            match[1]: other
            for other in reversed(there)
            for pattern in patterns
            if (match := re.fullmatch(pattern, other))
        }
        if not found:
            continue
        variants = sorted(variant for variant in found if variant)
        if None not in found and len(variants) > 1:
            raise ModelError(
                f"{name}: {part}/ has weights of the variants {', '.join(variants)} only: keep one of them"
            )
        variant = None if None in found else variants[0]
        chosen = folder / part / found[variant]
        if chosen.suffix != ".json":
            return Weights(variant, (chosen,))
        shards = sorted(set(read_json(folder, f"{part}/{chosen.name}", name).get("weight_map", {}).values()))
        gone = [shard for shard in shards if not (folder / part / shard).is_file()]
        if gone or not shards:
            raise ModelError(
                f"{name}: {part}/ has {len(shards) - len(gone)} of {len(shards)} shards, {', '.join(gone[:1])} is not "
                "there; download the model again"
            )
        return Weights(variant, (chosen, *(folder / part / shard for shard in shards)))
    raise ModelError(f"{name}: {part}/ has no weights ({' or '.join(WEIGHTS[library])}); download the model again")


def read_json(path: Path, file: str, name: str) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises ModelError: not there, or no object."""
    try:
        return dict(json.loads((path / file).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{name}: {file} cannot be read ({error}): download the model again") from error


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
