"""Every column a run writes, with its type and what it means: one place for writers, readers, exports and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.detectors import DETECTORS as _DETECTORS

F32 = pa.float32()

SCORE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "shard_id << 32 | row in shard; unique in a run"),
    "caption": (pa.string(), "the caption as it was read; null stays null"),
    "status": (pa.string(), "ok, error (see error) or empty (null or blank caption, not scored)"),
    "error": (pa.string(), "why a row failed"),
    "duplicate_of": (pa.int64(), "row_id of the first row with the same caption, which holds the scores"),
    "num_tokens": (pa.int32(), "tokens of the caption (of its first 65,536 characters), without start and end"),
    "truncated": (pa.bool_(), "the caption is longer than the tokenizer's length; the rest was not seen"),
    **{name: (F32, found.text) for name, found in _DETECTORS.items()},
    "ld_std": (F32, "standard deviation of ld over the noises"),
    "num_noises": (pa.int32(), "noises that the row's scores are means over: more where it had a second look"),
    "mask_source": (
        pa.string(),
        "where the mask of ld comes from: step:token[:layers]; none: why, for a model without one",
    ),
    "refined": (pa.bool_(), "a full trajectory was sampled for this row"),
    "ld_first": (F32, "ld of the first step under the BE mask of the final step: the paper's first-step LD"),
    "ld_10": (F32, "mean of ld over the first 10 steps, BE mask"),
    "ld_all": (F32, "mean of ld over all steps, BE mask"),
    "magnitude_10": (F32, "mean magnitude over the first 10 steps"),
    "magnitude_all": (F32, "mean magnitude over all steps"),
    "mask": (pa.null(), "attention mask of ld, float16 [H, W] (or bits: uint8 [H, W/8], set above the mask's mean)"),
    "energy_mask": (pa.null(), "mask of ld_energy: the smoothed energy map of the first step; stored as mask is"),
}
"""Columns of scores/, in order. Masks have their type from the run (`mask_type`); `--store-masks none` leaves them out.
"""
SCORE_MASKS = ("mask", "energy_mask")

DETECTORS = tuple(_DETECTORS)
"""First-step score columns, as pipelines/detectors.py has them."""
EXTRA_DETECTORS = tuple(name for name, found in _DETECTORS.items() if "low" in found.needs)
"""Those that take `--extra-evaluation`."""
MASK_DETECTORS = tuple(name for name, found in _DETECTORS.items() if {"mask", "token_attention"} & set(found.needs))
"""Those that take an attention a model may not have."""
STEADY_SCORE = "ld_energy"
"""Every model has it and it means the same in every run, so that a threshold of it holds for other captions too."""
RUN_DETECTORS = tuple(name for name, found in _DETECTORS.items() if {"null", "residual"} & set(found.needs))
"""Those measured against the run's own captions: no trajectory and no single prompt has them."""
WINDOWS = ("ld_first", "ld_10", "ld_all", "magnitude_10", "magnitude_all")
"""Score columns that take a trajectory."""
SCORES = (*DETECTORS, *WINDOWS)
"""Every column captions can be ranked by; higher is more suspicious."""

SECOND_LOOK_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "caption": (pa.string(), "the caption"),
    "error": (pa.string(), "why the second look failed; the row keeps its first scores"),
    **{name: SCORE_COLUMNS[name] for name in ("num_noises", *DETECTORS, "ld_std", *WINDOWS)},
}
"""Columns of second_look/, in order: one row a caption; whatever reads a run gives the row these scores."""
LOOKED_AT = tuple(SECOND_LOOK_COLUMNS)[3:]
"""Score columns that a second look replaces."""
NULL_MAP_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "caption": (pa.string(), "the caption"),
    "error": (pa.string(), "why it could not be scored; it is left out of the null maps"),
    "energy": (pa.null(), "energy map of the first step under the shard's noise, float32 [H, W]"),
    "residual": (pa.null(), "energy that is left without what the calmer captions have in common, float32 [H, W]"),
}
"""Columns of null_maps/, in order: one row a sampled caption, one shard a noise."""

MASKS = {"final": "be_mask", "first": "first_mask", "energy": "energy_mask"}
"""Masks of a trajectory by the word a flag takes: column of trajectories/."""

VERDICTS = ("global", "local", "none", "no_reference")
"""Verdicts, best proof first."""
COPIES = ("global", "local")
"""Verdicts that say a training picture was reproduced."""

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
    "ld_score": (F32, "first-step ld under score_map"),
    **{
        name: (F32, f"as in scores: {found.text}")
        for name, found in _DETECTORS.items()
        if not {"low", "null", "residual"} & set(found.needs) and name not in ("magnitude", "ld")
    },
}
"""Columns of trajectories/ and refined/, in order: one row a generated image."""
TRAJECTORY_MASKS = ("be_mask", "first_mask", "energy_mask", "score_map")

_COMPARISON: dict[str, tuple[pa.DataType, str]] = {
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
    "sscd": (
        F32,
        "cosine of the SSCD descriptors, the larger of whole picture and training crop; a copy when > 0.5",
    ),
    "s": (F32, "-1[sscd < 0.5] ||xhat - x||_2, pixels in [0, 1]"),
    "ls": (F32, "-1[sscd < 0.5] ||(xhat - x) m||_2 under the BE mask, as printed in the paper"),
    "ls_norm": (F32, "ls / mean(m)"),
    "ls_energy": (F32, "the same under the energy mask, divided by its mean"),
    "ls_score": (F32, "the same under the score-difference map, divided by its mean"),
    "ls_corr": (F32, "-1[sscd < 0.5] correlation distance under the energy mask, as the verdict has it"),
}
_COMPARISON["unreadable"] = (
    pa.string(),
    "why the comparison decides nothing: its picture, or those the local threshold needs, could not be read",
)
MEASURED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    **_COMPARISON,
    **{
        f"distance_{word}": (F32, f"||(xhat - x) m||_2 / mean(m) under {mask}, not gated")
        for word, mask in MASKS.items()
    },
    **{
        f"correlation_distance_{word}": (F32, f"1 - concordance correlation under {mask} cubed")
        for word, mask in MASKS.items()
    },
}
"""Of a comparison of one image and one training picture, before anything is decided."""
MATCH_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    **_COMPARISON,
    "distance": (F32, "||(xhat - x) m||_2 / mean(m) under the match mask, not gated"),
    "correlation_distance": (
        F32,
        "1 - concordance correlation of image and picture under the match mask cubed; 0 the same, 1 nothing in common",
    ),
    "verdict": (pa.string(), f"{', '.join(VERDICTS[:-1])} or {VERDICTS[-1]}"),
}
MATCHED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run; negative for a caption of --clean"),
    "caption": (pa.string(), "the caption"),
    "num_images": (pa.int32(), "images that were compared"),
    "matches": (pa.null(), "every comparison made, with the measures of every mask"),
}
"""Columns of matched/, in order: one row a caption that images were generated of."""
CONFIRMED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "caption": (pa.string(), "the caption"),
    "candidate_score": (F32, "the score it was picked by"),
    "candidate_rank": (pa.int32(), "its place by that score, 0 the best"),
    "verdict": (pa.string(), f"best of its images: {', '.join(VERDICTS[:-1])} or {VERDICTS[-1]}"),
    "verdict_images": (pa.int32(), "how many of its images have that verdict"),
    "num_images": (pa.int32(), "images generated"),
    "p_value": (
        F32,
        "chance that a caption that copies nothing comes as near to a picture, over all images and comparisons",
    ),
    "best": (pa.null(), "the match the verdict rests on, with the picture (reference_image, PNG)"),
    "matches": (pa.null(), "every comparison made"),
}


MITIGATED_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "row_id": (pa.int64(), "row of the run"),
    "image_index": (pa.int32(), "which noise of the bank the image starts from, before and after"),
    "caption": (pa.string(), "the caption"),
    "error": (pa.string(), "why the row failed; everything measured is null then"),
    "triggered": (pa.bool_(), "scored above the trigger threshold; other rows are left as they are"),
    "loss": (pa.string(), "ld or magnitude"),
    "target": (F32, "the optimisation stops when the loss is at most this"),
    "iterations": (pa.int32(), "updates of the embedding"),
    "loss_before": (F32, "the loss at the first step of the unmitigated prompt"),
    "loss_after": (F32, "the same of the mitigated prompt, under the same mask"),
    "magnitude_before": (F32, "||d||_2 at the first step"),
    "magnitude_after": (F32, "the same, mitigated"),
    "ld_before": (F32, "ld at the first step under the BE mask of the final step (the paper's first-step LD)"),
    "ld_after": (F32, "the same, mitigated, under the BE mask of the mitigated trajectory"),
    "reference_id": (pa.int64(), "the training picture confirm's verdict rests on, id in the index"),
    "reference_key": (pa.string(), "its key"),
    "sscd_before": (F32, "cosine of the SSCD descriptors of the image and that picture; a copy when > 0.5"),
    "sscd_after": (F32, "the same, mitigated"),
    "ls_norm_before": (F32, "-1[sscd < 0.5] ||(xhat - x) m||_2 / mean(m), BE mask of the unmitigated trajectory"),
    "ls_norm_after": (F32, "the same, mitigated, under the same mask"),
    "ls_energy_before": (F32, "the same under the energy mask of the unmitigated trajectory"),
    "ls_energy_after": (F32, "the same, mitigated, under the same mask"),
    "distance_before": (F32, "||(xhat - x) m||_2 / mean(m) under confirm's match mask, not gated"),
    "distance_after": (F32, "the same, mitigated, under the same mask"),
    "correlation_distance_before": (F32, "correlation distance under confirm's match mask: what `local` rests on"),
    "correlation_distance_after": (F32, "the same, mitigated, under the same mask"),
    "verdict_before": (pa.string(), "global, local or none, against that picture alone"),
    "verdict_after": (pa.string(), "the same, mitigated, by the same thresholds"),
    "alignment_before": (F32, "cosine of image and caption by CLIP (CLIP score); null without --clip"),
    "alignment_after": (F32, "the same, mitigated"),
    "image_before": (pa.binary(), "the unmitigated image, PNG"),
    "image_after": (pa.binary(), "the mitigated image from the same noise, PNG"),
}
"""Columns of mitigated/, in order: one row an image."""


def struct_of(columns: Mapping[str, tuple[pa.DataType, str]], **more: pa.DataType) -> pa.StructType:
    """A struct type with these columns, and more."""
    return pa.struct([(name, kind) for name, (kind, _) in columns.items()] + list(more.items()))


BEST_TYPE = struct_of(MATCH_COLUMNS, reference_image=pa.binary())
MATCHES_TYPE = pa.list_(struct_of(MATCH_COLUMNS))
MEASURED_TYPE = pa.list_(struct_of(MEASURED_COLUMNS))


def mask_type(store: str, height: int, width: int) -> pa.DataType | None:
    """Arrow type of the mask columns for `--store-masks none|bits|float16`."""
    if store == "none":
        return None
    if store == "bits":
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
        if name in SCORE_MASKS and mask is None:
            continue
        kind = mask if name in SCORE_MASKS else kind
        fields.append(pa.field(name, kind, metadata={"description": text}))
    return pa.schema([*fields, *keep])


def table_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[pa.DataType, str]]) -> pa.Table:
    """Rows as a table with documented columns; what a row lacks is null.

    Raises:
        KeyError: a row has a value without a column: nothing is dropped in silence.
    """
    unknown = {name for row in rows for name in row} - set(columns)
    if unknown:
        raise KeyError(f"no column for {', '.join(sorted(unknown))}: add it to audit/run/schema.py")
    fields = [pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in columns.items()]
    return pa.Table.from_pylist(list(rows), pa.schema(fields))
