"""Every column a run writes, with its type and what it means: one place for writers, readers, exports and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

F32 = pa.float32()

SCORE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "shard_id << 32 | row in shard; unique in a run"),
    "caption": (pa.string(), "the caption as it was read; null stays null"),
    "status": (pa.string(), "ok, error (see error) or empty (null or blank caption, not scored)"),
    "error": (pa.string(), "why a row failed"),
    "duplicate_of": (pa.int64(), "row_id of the first row with the same caption, which holds the scores"),
    "num_tokens": (pa.int32(), "tokens of the caption, without start and end"),
    "truncated": (pa.bool_(), "the caption is longer than the tokenizer's length; the rest was not seen"),
    "magnitude": (F32, "||d||_2, first step (Wen et al. 2024)"),
    "ld": (F32, "||d * m||_2 / mean(m), first step, mask as in mask_source (Chen et al. 2025)"),
    "ld_std": (F32, "standard deviation of ld over the noises"),
    "ld_energy": (F32, "ld with the smoothed energy map of the first step as its mask"),
    "mask_source": (pa.string(), "where the mask of ld comes from: step:token[:layers], or energy"),
    "webster": (F32, "sigma_max^2 mean(eps_cfg^2), first step (Webster 2023)"),
    "attention_entropy": (F32, "entropy of the attention over tokens, first step (Ren et al. 2024)"),
    "cosine": (F32, "cosine of eps_0 and d, first step"),
    "cosine_low": (F32, "cosine on pure noise at the third last timestep; null without --extra-evaluation"),
    "anisotropy": (F32, "magnitude + 2 cosine_low (Asthana & Belagiannis 2026); null without --extra-evaluation"),
    "refined": (pa.bool_(), "a full trajectory was sampled for this row"),
    "ld_first": (F32, "ld of the first step under the BE mask of the final step: the paper's first-step LD"),
    "ld_10": (F32, "mean of ld over the first 10 steps, BE mask"),
    "ld_all": (F32, "mean of ld over all steps, BE mask"),
    "magnitude_10": (F32, "mean magnitude over the first 10 steps"),
    "magnitude_all": (F32, "mean magnitude over all steps"),
    "mask": (pa.null(), "mask of ld, float16 [H, W] (or bits: uint8 [H, W/8], set above the mask's mean)"),
}
"""Columns of scores/, in order. `mask` has its type from the run (`mask_type`) and is left out with --masks none."""

DETECTORS = ("magnitude", "ld", "ld_energy", "webster", "attention_entropy", "cosine", "cosine_low", "anisotropy")
"""First-step score columns."""
DEFAULT_SCORE = "ld_energy"
"""What candidates are picked by: on the testbed the best first-step score (docs/tables.md), at one evaluation."""
WINDOWS = ("ld_first", "ld_10", "ld_all", "magnitude_10", "magnitude_all")
"""Score columns that take a trajectory."""

TRAJECTORY_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "image_index": (pa.int32(), "which noise of the bank the trajectory starts from"),
    "caption": (pa.string(), "the caption"),
    "error": (pa.string(), "why the trajectory failed; everything after is null then"),
    "image": (pa.binary(), "the generated image, PNG; null where it was not decoded"),
    "be_mask": (pa.null(), "BE mask: EOS attention of the final step, float32 [H, W]"),
    "first_mask": (pa.null(), "EOS attention of the first step, float32 [H, W]"),
    "energy_mask": (pa.null(), "smoothed energy map of the first step, float32 [H, W]"),
    "score_map": (pa.null(), "E_T / sigma_T^2 of the last step, float32 [H, W]"),
    "magnitude_t": (pa.list_(F32), "||d_t||_2 of every step"),
    "ld_t": (pa.list_(F32), "ld of every step under the BE mask"),
    "magnitude": (F32, "first step of magnitude_t"),
    "magnitude_10": (F32, "mean over the first 10 steps"),
    "magnitude_all": (F32, "mean over all steps"),
    "ld_first": (F32, "first step of ld_t: the paper's first-step LD"),
    "ld_10": (F32, "mean over the first 10 steps"),
    "ld_all": (F32, "mean over all steps"),
    "ld_first_mask": (F32, "first-step ld under first_mask"),
    "ld_energy": (F32, "first-step ld under energy_mask"),
    "ld_score": (F32, "first-step ld under score_map"),
    "webster": (F32, "as in scores"),
    "attention_entropy": (F32, "as in scores"),
    "cosine": (F32, "as in scores"),
}
TRAJECTORY_MASKS = ("be_mask", "first_mask", "energy_mask", "score_map")

MATCH_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "image_index": (pa.int32(), "which generated image"),
    "rank": (
        pa.int32(),
        "place among the nearest training pictures, 0 the nearest; -1 the caption's own, further away",
    ),
    "own": (pa.bool_(), "the picture the caption came with"),
    "reference_id": (pa.int64(), "id in the index"),
    "reference_key": (pa.string(), "key of the training picture"),
    "reference_url": (pa.string(), "its URL"),
    "reference_caption": (pa.string(), "its caption"),
    "sscd": (F32, "cosine of the SSCD descriptors; a copy when > 0.5"),
    "s": (F32, "-1[sscd < 0.5] ||xhat - x||_2, pixels in [0, 1]"),
    "ls": (F32, "-1[sscd < 0.5] ||(xhat - x) m||_2 under the BE mask, as printed in the paper"),
    "ls_norm": (F32, "ls / mean(m)"),
    "ls_energy": (F32, "the same under the energy mask, divided by its mean"),
    "ls_score": (F32, "the same under the score-difference map, divided by its mean"),
    "distance": (F32, "||(xhat - x) m||_2 / mean(m) under the match mask, not gated"),
    "p_value": (F32, "(1 + null distances, of different training pictures, at or below this one) / (1 + their number)"),
    "verdict": (pa.string(), "global, local, none or no_reference"),
}
CONFIRMED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "caption": (pa.string(), "the caption"),
    "candidate_score": (F32, "the score it was picked by"),
    "candidate_rank": (pa.int32(), "its place by that score, 0 the best"),
    "verdict": (pa.string(), "best of its images: global, local, none or no_reference"),
    "verdict_images": (pa.int32(), "how many of its images have that verdict"),
    "num_images": (pa.int32(), "images generated"),
    "best": (pa.null(), "the match the verdict rests on, with the picture (reference_image, PNG)"),
    "matches": (pa.null(), "every comparison made"),
}


def struct_of(columns: Mapping[str, tuple[pa.DataType, str]], **more: pa.DataType) -> pa.StructType:
    """A struct type with these columns, and more."""
    return pa.struct([(name, kind) for name, (kind, _) in columns.items()] + list(more.items()))


BEST_TYPE = struct_of(MATCH_COLUMNS, reference_image=pa.binary())
MATCHES_TYPE = pa.list_(struct_of(MATCH_COLUMNS))


def mask_type(masks: str, height: int, width: int) -> pa.DataType | None:
    """Arrow type of the `mask` column for `--masks none|bits|float16`."""
    if masks == "none":
        return None
    if masks == "bits":
        return pa.fixed_shape_tensor(pa.uint8(), (height, -(-width // 8)))
    return pa.fixed_shape_tensor(pa.float16(), (height, width))


def pack_mask_bits(masks: np.ndarray) -> np.ndarray:
    """Masks [N, H, W] as bits [N, H, ceil(W/8)], uint8, big-endian: set where the mask is above its own mean."""
    return np.packbits(masks > masks.mean((1, 2), keepdims=True), axis=-1)


def tensor_array(values: np.ndarray, kind: pa.DataType, rows: np.ndarray | None = None, length: int = 0) -> pa.Array:
    """An array of tensors [N, ...] as an Arrow tensor column; with `rows`, placed there among `length`, else null."""
    flat = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).ravel()
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind.storage_type)
    if rows is not None:
        places = np.full(length, -1, np.int64)
        places[rows] = np.arange(len(rows))
        storage = storage.take(pa.array(places, mask=places < 0))
    return pa.ExtensionArray.from_storage(kind, storage)


def tensor_values(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A tensor column without nulls back as one array [N, ...]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return np.asarray(array.to_numpy_ndarray())


def scores_schema(mask: pa.DataType | None, keep: Sequence[pa.Field] = ()) -> pa.Schema:
    """Schema of scores/: the columns above, then the input's own that are carried through."""
    fields: list[Any] = []
    for name, (kind, text) in SCORE_COLUMNS.items():
        if name == "mask":
            if mask is None:
                continue
            kind = mask
        fields.append(pa.field(name, kind, metadata={"description": text}))
    return pa.schema([*fields, *keep])
