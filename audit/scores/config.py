"""Flags that say how captions are scored: those of scan and of calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from audit.base.options import option
from audit.captions import AUTO, QUOTINGS, TextFormat
from audit.engines.config import EngineFlags
from audit.run.run import DEFAULT_RUN

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float8")
DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps."
MODEL_HELP = "Hub id, diffusers folder or .safetensors checkpoint; `testbed` is the embedded model."


@dataclass(frozen=True)
class ModelFlags:
    """Which model: weights, and what is added to them."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP)
    revision: str | None = option(None, "Revision of a hub model.")
    model_config: str | None = option(
        None, "With a checkpoint file as the model: diffusers folder of the same architecture."
    )
    lora: tuple[str, ...] = option((), "LoRA files merged into the weights, FILE or FILE:SCALE, comma-separated.")
    textual_inversion: tuple[str, ...] = option((), "Files of learned tokens, FILE:TOKEN, comma-separated.")
    allow_pickle: bool = option(False, "Load weights that are pickles (.bin, .pt) too: only from those you trust.")


@dataclass(frozen=True)
class CaptionFlags:
    """Which captions, and the run they are scored into."""

    captions: tuple[str, ...] = option((), "Caption files, folders, globs or data sets.", argument=True)
    output: str = option(DEFAULT_RUN, "Run folder (any fsspec URL).", short="-o", envvar="BE_AUDIT_RUN")


@dataclass(frozen=True)
class ScoreFlags:
    """How captions are read, and which scores they get."""

    caption_col: str | None = option(None, "Caption column; found by itself (TEXT, caption, text, prompt, ...).")
    delimiter: str | None = option(None, "Of CSV files: a character, or tab; default a comma, a tab for .tsv.")
    no_header: bool = option(False, "The first row of CSV files is a caption's, not names: url, caption, column_N.")
    encoding: str | None = option(None, "Of CSV and JSON files; default UTF-8, UTF-16 by its byte order mark.")
    quoting: str | None = option(
        None,
        "Of CSV files: none where quotes are letters; default csv, none for tab-separated ones without a header.",
        choices=QUOTINGS,
    )
    limit: int | None = option(None, "Scan the first N rows only.", min=1)
    mask: str = option(
        "first",
        "Attention mask of ld: of the first step, at no further cost, or of the final step (the paper's), which takes "
        "a whole trajectory a caption.",
        choices=("first", "final"),
    )
    mask_token: str = option("eos", "Whose attention the mask of ld is.", choices=("eos", "bos", "padding"))
    mask_layers: tuple[str, ...] = option(
        (), "Attention layers of the mask of ld, comma-separated; default the paper's two."
    )
    num_noises: int = option(1, "Initial noises every caption is scored with.", min=1, max=4096)
    steps: int = option(50, "Sampling steps.", min=1)
    guidance_scale: float = option(7.5, "Classifier-free guidance scale.")
    seed: int = option(0, "Seed of the noise bank.", min=0, max=2**63 - 1)
    dtype: str = option(
        "auto",
        "auto is float16 on CUDA, else float32; bfloat16 moves scores by several per cent, float8 by more.",
        choices=DTYPES,
    )
    device: str = option("auto", DEVICE_HELP)
    batch_size: int | Literal["auto"] = option(
        32,
        "Latents in one call of the denoiser; halved when memory runs out; auto doubles 16 while that is faster.",
        min=1,
        word=AUTO,
    )
    rows_per_shard: int | Literal["auto"] = option(
        AUTO,
        "Rows of a shard, what a kill can lose; auto is 1,024, or more where there would be over 20,000 shards.",
        min=1,
        word=AUTO,
    )
    extra_evaluation: bool = option(False, "One more evaluation a caption, for the anisotropy score.")

    @property
    def text_format(self) -> TextFormat:
        """How text files of captions are written. Raises AuditError naming the flag that makes no sense."""
        return TextFormat.of(self.delimiter, self.no_header, self.encoding, self.quoting)


@dataclass(frozen=True)
class ScoringConfig(EngineFlags, ScoreFlags, ModelFlags, CaptionFlags):
    """Which captions, which model, which scores, and where it runs: in this order, the bases' last first."""
