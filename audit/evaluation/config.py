"""Which run is measured against which labels."""

from __future__ import annotations

from dataclasses import dataclass

from audit.base.options import option
from audit.run.run import DEFAULT_RUN


@dataclass(frozen=True)
class EvaluateConfig:
    """Which run, against which labels. Every field is a flag of `be-audit evaluate`."""

    run: str = option(DEFAULT_RUN, "Run folder.", argument=True, envvar="BE_AUDIT_RUN")
    labels: str | None = option(None, "File with a caption (or --key) and a label a row.")
    label_col: str = option("label", "Column of the labels.")
    caption_col: str | None = option(None, "Caption column of the labels; found by itself as scan does.")
    key: str | None = option(None, "Join by this column, which the run kept (scan --keep-cols), not by caption.")
    cluster_col: str | None = option(
        None, "Column that says which captions belong together; default every distinct caption by itself."
    )
    clean: tuple[str, ...] = option(("none", "clean", "0", "false"), "Labels of clean captions, comma-separated.")
    positive: tuple[str, ...] = option((), "Labels of memorised captions; default every label that is not clean.")
    output: str | None = option(None, "Folder of the results (any fsspec URL); default RUN/evaluate.", short="-o")
    resamples: int = option(1000, "Bootstrap resamples of the 95 % intervals.", min=100)
    seed: int = option(0, "Seed of the resamples.", min=0)
