"""What an opened row of the report shows: its pictures, masks, scores by step and comparisons, one file a row."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from audit.base.progress import Progress
from audit.base.storage import Folder
from audit.run.run import Run
from audit.run.schema import TRAJECTORY_MASKS, VERDICTS
from audit.run.stage import CONFIRM, MITIGATE, TRAJECTORIES, Stage

LOSSLESS_SIDE = 128  # larger pictures are WebP at QUALITY; the exact ones stay in the run
QUALITY = 88
MASK_COLOUR = (255, 0, 128)
REGION = 0.75  # of an energy mask's mean: its region lies above, best by IoU on the testbed (docs/tables.md, table 2)
_MOST_MATCHES = 100
_MITIGATED = ("loss", "ld", "magnitude", "sscd", "distance", "alignment", "verdict")  # each _before and _after


def script(function: str, *values: Any) -> bytes:
    """A call with JSON arguments as a script file: what a page opened from disk can load without a server."""
    text = ", ".join(json.dumps(value, allow_nan=False, separators=(",", ":")) for value in values)
    text = text.replace("<", "\\u003c")  # never read as a tag, wherever the file is put
    return f"{function}({text});\n".encode()


def write_rows(run: Run, folder: Folder, listed: set[int]) -> dict[int, dict[str, str | None]]:
    """Write `rows/ID.js` and `pictures/` for every listed row that has trajectories.

    Args:
        run: the run. folder: the report's. listed: row_ids.
    Returns:
        by row_id its thumbnails: `image` and `reference`, paths in the report, None where there is none.
    """
    trajectories, confirmed = Stage.find(run, TRAJECTORIES), Stage.find(run, CONFIRM)
    if trajectories is None:
        return {}
    done = sorted(trajectories.done())
    decided = set(confirmed.ledger.done(done)) if confirmed else set()
    mitigated = _mitigated(run, confirmed)
    thumbnails: dict[int, dict[str, str | None]] = {}
    written: set[str] = set()
    with ThreadPoolExecutor(8) as pool, Progress(len(done), "shards", "pictures") as progress:
        for shard in done:
            verdicts = confirmed.table(shard).to_pylist() if shard in decided else []  # type: ignore[union-attr]
            of = {row["row_id"]: row for row in verdicts}
            moved = mitigated(shard)
            table = trajectories.table(shard)
            table = table.filter(pc.is_in(table["row_id"], value_set=_array(listed)))
            rows: dict[int, list[dict[str, Any]]] = {}
            for image in _images(table):
                rows.setdefault(image["row_id"], []).append(image)
            files: dict[str, Callable[[], bytes]] = {}
            for row_id, images in rows.items():
                thumbnails[row_id] = _row_files(row_id, images, of.get(row_id), moved, files)
            new = {name: make for name, make in files.items() if name not in written}
            list(pool.map(lambda item: _write(folder, item[0], item[1]()), new.items()))
            written |= new.keys()
            progress.add(1)
    return thumbnails


def _mitigated(run: Run, confirmed: Stage | None) -> Callable[[int], dict[tuple[int, int], dict[str, Any]]]:
    """Reader of the rows of mitigated/ of a shard (confirm's shards) by row_id and image_index.

    A mitigation of an earlier confirm's verdicts is left out.
    """
    stage = Stage.find(run, MITIGATE)
    if stage is None or confirmed is None or not stage.rests_on(confirmed):
        return lambda _: {}
    done = set(stage.done())

    def read(shard: int) -> dict[tuple[int, int], dict[str, Any]]:
        rows = stage.table(shard).to_pylist() if shard in done else []
        return {(row["row_id"], row["image_index"]): row for row in rows}

    return read


def _write(folder: Folder, name: str, data: bytes) -> None:
    """Without the fsync of Folder.write: a report is made again, a run is not."""
    path = folder.path(name)
    folder.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    folder.fs.pipe_file(path, data)


def _array(values: set[int]) -> pa.Array:
    return pa.array(sorted(values), pa.int64())


def _images(table: Any) -> list[dict[str, Any]]:
    """Rows of trajectories/ as dicts, masks as arrays [H, W]."""
    masks = {}
    for name in TRAJECTORY_MASKS:
        column = table[name].combine_chunks()
        storage = column.storage if hasattr(column, "storage") else column.chunk(0).storage
        masks[name] = [None if each is None else np.reshape(each, column.type.shape) for each in storage.to_pylist()]
    rows = table.drop_columns(list(TRAJECTORY_MASKS)).to_pylist()
    return [{**row, **{name: masks[name][at] for name in masks}} for at, row in enumerate(rows)]


def _row_files(
    row_id: int,
    images: list[dict[str, Any]],
    verdict: dict[str, Any] | None,
    mitigated: dict[tuple[int, int], dict[str, Any]],
    files: dict[str, Callable[[], bytes]],
) -> dict[str, str | None]:
    """Add the files of one row to `files`, name -> maker of its bytes; returns its thumbnails."""
    shown: list[dict[str, Any]] = []
    for image in sorted(images, key=lambda each: each["image_index"]):
        one = {"index": image["image_index"], "error": image["error"], "src": None, "masks": {}}
        if image["image"] is not None:
            one["src"] = _picture_name(f"{row_id}-{image['image_index']}", image["image"])
            files[one["src"]] = _maker(image["image"])
        one["masks"] = {
            name: mask_url(image[name], name == "energy_mask") for name in TRAJECTORY_MASKS if image[name] is not None
        }
        one["steps"] = {name: _rounded(image[name]) for name in ("ld_t", "magnitude_t")}
        one["mitigated"] = _mitigation(mitigated.get((row_id, image["image_index"])), one["src"], files)
        shown.append(one)
    detail: dict[str, Any] = {"images": shown, "best": None, "matches": []}
    reference = None
    if verdict is not None:
        best = verdict["best"]
        if best is not None:
            pixels = best.pop("reference_image")
            if pixels is not None:
                reference = _picture_name(f"training-{best['reference_id']}", pixels)
                files[reference] = _maker(pixels)
            detail["best"] = {**_plain(best), "src": reference}
        matches = sorted(verdict["matches"], key=_closest)[:_MOST_MATCHES]
        detail["matches"] = [_plain(match) for match in matches]
    files[f"rows/{row_id}.js"] = lambda: script("BE_AUDIT.detail", str(row_id), detail)
    chosen = detail["best"]["image_index"] if detail["best"] else None
    of_best = next((one for one in shown if one["index"] == chosen), shown[0])
    return {"image": of_best["src"], "reference": reference}


def _mitigation(
    row: dict[str, Any] | None, src: str | None, files: dict[str, Callable[[], bytes]]
) -> dict[str, Any] | None:
    """A row of mitigated/ for the page: the image after (the one before is `src`) and numbers (before, after)."""
    if row is None or row["image_after"] is None:
        return None if row is None else {"error": row["error"]}
    after = src
    if row["triggered"] or src is None:
        after = _picture_name(f"{row['row_id']}-{row['image_index']}-mitigated", row["image_after"])
        files[after] = _maker(row["image_after"])
    pairs = {name: [_value(row[f"{name}_{when}"]) for when in ("before", "after")] for name in _MITIGATED}
    told = {name: _value(row[name]) for name in ("triggered", "iterations", "target")}
    return {"before": src, "after": after, "error": row["error"], **told, "pairs": pairs}


def _value(value: Any) -> Any:
    return _number(value) if isinstance(value, float) else value


def _closest(match: dict[str, Any]) -> tuple[int, float]:
    return VERDICTS.index(match["verdict"]), -match["sscd"]


def _plain(match: dict[str, Any]) -> dict[str, Any]:
    """A match for JSON: ids as text (they are beyond what JavaScript counts exactly), floats finite and short."""
    return {key: str(value) if key == "reference_id" else _value(value) for key, value in match.items()}


def _number(value: float | None) -> float | None:
    """Six significant digits; null for NaN and infinity."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def _rounded(values: list[float] | None) -> list[float | None]:
    return [] if values is None else [_number(value) for value in values]


def _small(data: bytes) -> bool:
    return max(Image.open(io.BytesIO(data)).size) <= LOSSLESS_SIDE


def _picture_name(stem: str, data: bytes) -> str:
    return f"pictures/{stem}.{'png' if _small(data) else 'webp'}"


def _maker(data: bytes) -> Callable[[], bytes]:
    return lambda: data if _small(data) else _webp(data)


def _webp(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def mask_url(mask: np.ndarray, region: bool = False) -> str:
    """A mask [H, W] as a data: PNG of its own size in one colour, opaque at its maximum, clear at its minimum.

    Args:
        region: clear wherever the mask is not above `REGION` times its mean, and half opaque at that edge.
    """
    low, high = float(mask.min()), float(mask.max())
    edge = REGION * float(mask.mean()) if region else low
    alpha = np.zeros(mask.shape)
    if high > low:
        least = 0.5 if region else 0.0
        alpha = np.where(mask > edge, least + (1 - least) * (mask - edge) / (high - edge), 0)
    picture = np.empty((*mask.shape, 4), np.uint8)
    picture[..., :3] = MASK_COLOUR
    picture[..., 3] = np.round(alpha * 255)
    buffer = io.BytesIO()
    Image.fromarray(picture, "RGBA").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
