"""How prompts are mitigated: flags that a run and a single prompt share, and the CLIP that measures alignment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from audit import testbed
from audit.base.errors import AuditError
from audit.base.options import option
from audit.run.schema import MASKS
from audit.scores.config import DEVICE_HELP
from audit.scores.model import naming_the_flag

if TYPE_CHECKING:
    from pipelines.alignment import ClipScore

MASK_LOSS = {"final": "ld_first", "first": "ld_first_mask", "energy": "ld_energy"}
"""Column of trajectories/ that holds ld at the first step, by mask."""


@dataclass(frozen=True)
class MovingConfig:
    """How an embedding is moved, and what the result is measured with."""

    loss: str = option("ld", "What is brought down: ld, or magnitude (the baseline).", choices=("ld", "magnitude"))
    mask: str | None = option(
        None,
        "Mask of ld, of the unmitigated trajectory; default final, or energy for a model without attention masks.",
        choices=tuple(MASKS),
    )
    target: float | None = option(
        None,
        "Stop at this loss; default its median over clean captions of the run (--prompt: 0.15 of its own).",
        min=0.0,
    )
    threshold: float | None = option(None, "Trigger: mitigate only what scores above this; default all.")
    learning_rate: float = option(0.05, "Of AdamW.", min=0.0)
    iterations: int = option(10, "Updates of an embedding at most.", min=0)
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    num_images: int | None = option(None, "Images a caption; default as many as confirm made (--prompt: 1).", min=1)
    index: str | None = option(
        None, "Index of the training pictures; default the one confirm used.", envvar="BE_AUDIT_INDEX"
    )
    sscd: str | None = option(None, "Copy descriptor file; default the one the index was made with.")
    clip: str | None = option(None, "CLIPModel folder for text alignment; the testbed has its own.")
    device: str = option("auto", DEVICE_HELP)
    batch_size: int = option(8, "Images at a time; halved when memory runs out.", min=1)


def trigger_column(loss: str, mask: str) -> str:
    """Score column that triggers (the one calibrated): the first-step score nearest to the loss."""
    if loss == "magnitude":
        return "magnitude"
    return "ld_energy" if mask == "energy" else "ld"


def find_clip(clip: str | None, model: str) -> str | None:
    """The CLIP folder as an absolute path: as given, or the testbed's own for the testbed; None for no alignment.

    Raises:
        AuditError: no CLIPModel there.
    """
    if clip is None:
        return str(testbed.CLIP) if model == "testbed" else None
    if not (Path(clip).expanduser() / "config.json").is_file():
        raise AuditError(f"--clip {clip}: no config.json in it; give the folder of a transformers CLIPModel")
    return os.path.abspath(os.path.expanduser(clip))


def open_clip(clip: str | None, device: str) -> ClipScore | None:
    """The loaded CLIP of `find_clip`'s folder. Raises AuditError when it cannot be loaded."""
    from pipelines.alignment import load_clip

    if clip is None:
        return None
    with naming_the_flag():
        return load_clip(clip, device)
