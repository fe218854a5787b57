"""The embedded testbed: a small Stable-Diffusion-shaped pipeline that truly memorises known pictures, with its labels.

`PIPELINE` (diffusers folder), `CLIP` (transformers folder), `DESCRIPTOR` (TorchScript, called like SSCD), `CAPTIONS`
and `PICTURES` (parquet). What each holds, how it was measured and what it is not: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_HERE = Path(__file__).parent
PIPELINE = _HERE / "pipeline"
CLIP = _HERE / "clip"
DESCRIPTOR = _HERE / "copy_descriptor.torchscript.pt"
CAPTIONS = _HERE / "captions.parquet"
PICTURES = _HERE / "pictures.parquet"


def regions() -> dict[str, np.ndarray]:
    """The true fixed region of every template, by cluster name: bool [64, 64], True where training pictures agree."""
    import numpy as np  # here, so that importing the paths costs nothing

    with np.load(_HERE / "regions.npz") as packed:
        masks = np.unpackbits(packed["regions"], axis=-1).astype(bool)
        return dict(zip(packed["clusters"].tolist(), masks, strict=True))
