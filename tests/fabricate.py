"""Run folders written by the real run, stage and commit code, with made-up scores and verdicts: no model is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from audit.base.facts import to_json
from audit.base.storage import Folder
from audit.captions import plan_captions, read_shard
from audit.run.run import Fingerprint, ModelFacts, Run
from audit.run.schema import MATCH_COLUMNS, TRAJECTORY_COLUMNS, TRAJECTORY_MASKS, scores_schema, tensor_array
from audit.run.select import best_rows, with_images
from audit.run.stage import CONFIRM, SCAN, TRAJECTORIES, Stage
from audit.scores.refine import begin_refine
from audit.statistics.null import PICTURES, Null, NullFacts
from audit.verdicts.candidates import ConfirmConfig, TrajectoriesFingerprint
from audit.verdicts.confirm import NULL_FILE
from audit.verdicts.confirm_shard import confirmed_table

SIDE, MASK_SIDE = 32, 8


@dataclass(frozen=True)
class Neighbours:
    """What these verdicts depend on."""

    neighbours: int
    trajectories: str


HOSTILE = (
    "<script>window.hacked = 1</script> a poster",
    '"><img src=x onerror="window.hacked = 1"> a mug',
    "</script><script>window.hacked = 1</script>",
    "javascript:window.hacked=1 'quoted' \"twice\" `ticks` ${window.hacked = 1} {{ 7 * 7 }}",
    "\u202eright to left override and \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f468",
    "\u2028line separator\u2029 and \x00 control \x07 characters",
    '=HYPERLINK("http://evil.example","click")',
    "+1 and -2",
    "@SUM(A1)",
    "\ttab first",
    "long " + "word " * 2000,
)
HOSTILE_URLS = (
    "javascript:window.hacked=1",
    "data:text/html,<script>window.hacked=1</script>",
    ' https://ok.example/a?b=<c>&d="e"',
)


def png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def make_run(
    folder: Path,
    captions: Sequence[str],
    *,
    urls: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    failed: Sequence[int] = (),
    rows_per_shard: int = 4096,
    shards: int | None = None,
    keep: Sequence[str] = ("url", "key"),
    column: str = "caption",
) -> Run:
    """A run whose scan has `shards` committed shards (all by default).

    Args:
        folder: a new folder; RUN is made in it, with the caption file beside.
        captions, urls: of every row. scores: ld_energy of every row, random by default; the other scores follow it.
        failed: rows whose status is error. keep: input columns carried through. column: of the captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "captions.csv"
    urls = (
        urls if urls is not None else [f"https://site{row % 7}.example.com/{row}.png" for row in range(len(captions))]
    )
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([column, "url", "key"])
        writer.writerows(
            (caption, url, f"k{row:07d}") for row, (caption, url) in enumerate(zip(captions, urls, strict=True))
        )
    plan = plan_captions(
        [str(source)],
        caption_col=column,
        keep_cols=tuple(keep),
        limit=None,
        rows_per_shard=rows_per_shard,
        staging=Folder(folder / "RUN"),
    )
    fingerprint = Fingerprint(
        formula_version=1,
        inputs=[{"path": str(source), "rows": len(captions)}],
        limit=None,
        rows_per_shard=rows_per_shard,
        keep_cols=list(keep),
        model=ModelFacts("0" * 64),
        scheduler={},
        dtype="float32",
        steps=50,
        guidance_scale=7.5,
        seed=0,
        num_noises=1,
        mask="first",
        mask_token="eos",
        mask_layers=[],
        store_masks="none",
        extra_evaluation=False,
    )
    config = {"max_error_rate": 1.0, "max_shard_retries": 3, "caption_col": column}
    run = Run.create(Folder(folder / "RUN"), config, fingerprint, plan, "testbed")
    values = np.asarray(
        scores if scores is not None else np.random.default_rng(0).gamma(4, 0.3, len(captions)), np.float32
    )
    stage = Stage.open(run, SCAN)
    for shard in range(len(plan) if shards is None else shards):
        table = _scores(run, shard, values, set(failed))
        counts = {name: table["status"].to_pylist().count(name) for name in ("ok", "error")}
        stage.ledger.commit(shard, table, counts, {"score": 1.5, "wall": 2.0})
    return run


def _scores(run: Run, shard: int, values: np.ndarray, failed: set[int]) -> pa.Table:
    rows = read_shard(run.plan, shard, run.folder)
    start = run.plan.shards["row_start"][shard].as_py()
    at = np.arange(start, start + rows.num_rows)
    of = run.plan.duplicates(shard)
    bad = np.isin(at, list(failed))
    scored = (of < 0) & ~bad
    columns: dict[str, Any] = {
        "row_id": pa.array((shard << 32) | np.arange(rows.num_rows), pa.int64()),
        "caption": rows["caption"].cast(pa.string()),
        "status": pa.array(np.where(bad, "error", "ok")),
        "error": pa.array(["ValueError: made to fail" if each else None for each in bad], pa.string()),
        "duplicate_of": pa.array(of, pa.int64(), mask=of < 0),
        "num_tokens": pa.array(np.full(rows.num_rows, 9), pa.int32(), mask=~scored),
        "truncated": pa.array(np.zeros(rows.num_rows, bool), mask=~scored),
        "mask_source": pa.array(["first:eos"] * rows.num_rows),
        "refined": pa.array(np.zeros(rows.num_rows, bool)),
    }
    for place, name in enumerate(("magnitude", "ld", "ld_std", "ld_energy", "webster", "attention_entropy", "cosine")):
        factor = 1.0 if name == "ld_energy" else 0.5 + 0.1 * place
        columns[name] = pa.array(values[at] * np.float32(factor), pa.float32(), mask=~scored)
    keep = [rows.schema.field(name) for name in run.plan.keep_cols]
    schema = scores_schema(None, keep)
    arrays = []
    for field in schema:
        source = columns.get(field.name, rows[field.name] if field.name in run.plan.keep_cols else None)
        arrays.append(pa.nulls(rows.num_rows, field.type) if source is None else source)
    return pa.table(arrays, schema=schema)


def add_confirm(
    run: Run,
    verdicts: Sequence[str],
    *,
    num_images: int = 1,
    decided: bool = True,
    side: int = SIDE,
    null: Null | None = None,
) -> None:
    """Confirm the best-scored captions with these verdicts, in the order of their score.

    The generated image of a global verdict is its training picture with one grey level added; of a local one the left
    half is the same; else they are unrelated. `decided=False` leaves the verdicts out: a confirm in progress.
    """
    rng = np.random.default_rng(1)
    chosen = best_rows(run, "ld_energy", top_k=len(verdicts))
    chosen = chosen.append_column("clean", pa.array(np.zeros(chosen.num_rows, bool)))
    items = with_images(chosen.append_column("shard", pa.array(np.zeros(chosen.num_rows), pa.int32())), num_images)
    config = ConfirmConfig(num_images=num_images, neighbours=2, index="pictures-index")
    asked = TrajectoriesFingerprint("ld_energy", len(verdicts), "", None, num_images)
    trajectories = Stage.begin(run, TRAJECTORIES, asked, items, config)
    first = items.filter(pa.array(items["image_index"].to_numpy() == 0))
    null = null or Null.of(PICTURES, np.linspace(0.3, 0.9, 400), 0.01)
    beside = {NULL_FILE: to_json(NullFacts.of(null))}
    confirm = Stage.begin(run, CONFIRM, Neighbours(2, trajectories.facts.digest), first, config, beside=beside)
    pictures: list[bytes] = []
    rows = []
    for at, (item, verdict) in enumerate(zip(chosen.to_pylist(), verdicts, strict=True)):
        reference = rng.integers(0, 200, (side, side, 3), dtype=np.uint8)
        matches = []
        for image_index in range(num_images):
            image = reference + np.uint8(1)
            if verdict != "global":
                image[:, (side // 2 if verdict == "local" else 0) :] = rng.integers(0, 255, 3, dtype=np.uint8)
            pictures.append(png(image))
            for rank in range(0 if verdict == "no_reference" else 2):
                matches.append(_match(at, image_index, rank, verdict if rank == 0 else "none"))
        best = {**matches[0], "reference_image": png(reference)} if matches else None
        rows.append(
            {
                "row_id": item["row_id"],
                "caption": item["caption"],
                "candidate_score": item["score"],
                "candidate_rank": item["rank"],
                "verdict": verdict,
                "verdict_images": num_images,
                "num_images": num_images,
                "p_value": {"global": 1 / 401, "local": 2 / 401, "none": 0.5}.get(verdict),
                "best": best,
                "matches": matches,
            }
        )
    table = trajectories_table(items, pictures)
    trajectories.ledger.commit(0, table, {"ok": table.num_rows}, {"wall": 3.0})
    if decided:
        confirm.ledger.commit(0, confirmed_table(rows), {}, {"wall": 1.0})


def _match(at: int, image_index: int, rank: int, verdict: str) -> dict[str, Any]:
    sscd = {"global": 0.93, "local": 0.4}.get(verdict, 0.2) - 0.01 * rank
    numbers = {name: -1.5 - rank for name, (kind, _) in MATCH_COLUMNS.items() if kind == pa.float32()}
    return {
        **numbers,
        "image_index": image_index,
        "rank": rank,
        "own": rank == 0,
        "reference_id": 1000 * rank + at,
        "reference_key": f"pic{1000 * rank + at}",
        "reference_url": HOSTILE_URLS[at % 3] if at < 3 else f"https://pictures.example.com/{1000 * rank + at}.jpg",
        "reference_caption": f"training picture <b>{at}</b>",
        "sscd": sscd,
        "distance": 1.5 + rank,
        "correlation_distance": 0.1 + 0.1 * rank,
        "verdict": verdict,
    }


def trajectories_table(items: pa.Table, pictures: Sequence[bytes | None]) -> pa.Table:
    """Rows of trajectories/ with these pictures (PNG), a made-up number in every other column."""
    count = items.num_rows
    arrays, fields = [], []
    for place, (name, (kind, _)) in enumerate(TRAJECTORY_COLUMNS.items()):
        if name in TRAJECTORY_MASKS:
            kind = pa.fixed_shape_tensor(pa.float32(), (MASK_SIDE, MASK_SIDE))
            column = tensor_array(np.random.default_rng(place).random((count, MASK_SIDE, MASK_SIDE)), kind)
        elif name in items.schema.names:
            column = items[name].cast(kind)
        elif name == "image":
            column = pa.array(pictures, kind)
        elif name == "error":
            column = pa.nulls(count, kind)
        elif name in ("magnitude_t", "ld_t"):
            ends = items["image_index"].to_pylist()  # every image of a caption has a curve of its own
            column = pa.array([np.linspace(2, 1 + end / 2, 50).tolist() for end in ends], kind)
        else:
            column = pa.array(np.full(count, float(place)), kind)
        arrays.append(column)
        fields.append(pa.field(name, kind))
    return pa.table(arrays, schema=pa.schema(fields))


def add_refine(run: Run, fraction: float) -> None:
    """Refine the best-scored part of the captions, without pictures."""
    stage = begin_refine(run, fraction, "ld_energy")
    for shard in stage.shards:
        items = stage.rows(shard)
        table = trajectories_table(items, [None] * items.num_rows)
        stage.ledger.commit(shard, table, {"ok": table.num_rows}, {"wall": 1.0})
