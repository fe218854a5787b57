"""What the testbed depends on besides the code, and the command-line flags made from it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SPRITES = Path(__file__).parent / "sprites.npz"


@dataclass(frozen=True)
class Recipe:
    """Sizes, budgets and seed; the defaults are those of the shipped testbed."""

    seed: int = 0  # the world and every random choice
    general: int = 60_000  # pictures seen once; a quarter as many template pictures are drawn beside them
    clip_seconds: float = 360.0
    vae_seconds: float = 480.0
    unet_seconds: float = 4860.0  # on top of what a checkpoint has had
    unet_steps: int | None = None  # so many instead
    channels: tuple[int, ...] = (64, 128, 192)  # of the U-Net, by resolution
    batch: int = 40  # of the U-Net
    general_share: float = 0.5  # of a batch of the U-Net
    local_share: float = 0.28  # the rest are repeated pictures
    common_only: bool = False  # leave the rarely repeated pictures and templates out of the world

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser, *names: str) -> None:
        """Add a kebab-case flag for each named field."""
        for field in (f for f in fields(cls) if f.name in names):
            flag, default = "--" + field.name.replace("_", "-"), field.default
            if isinstance(default, bool):
                parser.add_argument(flag, action="store_true")
            elif isinstance(default, tuple):
                parser.add_argument(flag, type=int, nargs="+", default=default)
            else:
                parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Recipe:
        """The recipe that parsed flags describe; fields without a flag keep their default."""
        known: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        if "channels" in known:
            known["channels"] = tuple(known["channels"])
        return cls(**known)
