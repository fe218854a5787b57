"""What does mitigation cost? Similarity to the training picture against text alignment, on the testbed's copies.

    python -m tests.benchmarks.tradeoff [--work DIR] [--docs DIR] [--captions N] [--quick]

N global and N local captions the model copies, one noise each, mitigated by every loss to several targets and by the
baselines at several strengths; a point is kept in --work once it is measured. Writes tables/mitigation.csv, .png and
.md below --docs. About 9 minutes on two CPU cores. The testbed is small and not Stable Diffusion.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from audit import testbed
from audit.base.progress import Progress
from audit.cli.demo import COPIED
from audit.mitigation.config import MASK_LOSS
from audit.mitigation.mitigate_shard import move_and_sample
from audit.run.schema import MASKS
from pipelines import Mitigator, TrajectorySampler, find_model, load
from pipelines.alignment import load_clip
from pipelines.baselines import insert_random_numbers, insert_random_tokens, rescaled_attention
from pipelines.descriptor import load_descriptor

KINDS = ("global", "local")
LOSSES = {"ld": ("ld", "final"), "ld, energy mask": ("ld", "energy"), "magnitude": ("magnitude", "final")}
FACTORS = (3.0, 2.0, 1.5, 1.0, 0.7)  # targets: this times the median loss of ordinary captions
INSERTIONS = (1, 2, 4)
BASELINES = {"random tokens": INSERTIONS, "random numbers": INSERTIONS, "rescaled attention": (1.25, 2.0, 4.0)}
FALLS = {"a quarter": 0.25, "half": 0.5}  # of the unmitigated mean sscd, where methods are compared
RESAMPLES = 2000
DOCS = Path(__file__).parents[2] / "docs"
MEASURES = ("sscd", "copy_error", "alignment")


@dataclass(frozen=True)
class Point:
    """A mitigation at one strength; `setting` is a factor, a number of insertions, or the start-of-text factor."""

    method: str
    setting: float

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting:g}".replace(",", "").replace(" ", "-")


class Bench:
    """The model, its copied captions and what their images are compared with."""

    def __init__(self, work: Path, num_captions: int, steps: int, ordinary: int) -> None:
        table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
        copied = table[table.copy_error < COPIED].drop_duplicates("cluster")
        chosen = [copied[copied.label == kind].sample(num_captions, random_state=0) for kind in KINDS]
        rows = pd.concat(chosen)
        unseen = table[table.cluster.str.startswith("unseen")].sample(ordinary, random_state=0)
        self.captions, self.kinds, self.ordinary = rows.TEXT.tolist(), rows.label.to_numpy(), unseen.TEXT.tolist()
        key = json.dumps([self.captions, self.ordinary, steps])
        self.folder = work / hashlib.sha256(key.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps = steps
        self.model = load(find_model(str(testbed.PIPELINE)), "cpu")
        self.sampler = TrajectorySampler(self.model, steps=steps, batch_size=len(self.captions))
        self.clip = load_clip(testbed.CLIP, "cpu")
        self.describe = load_descriptor(testbed.DESCRIPTOR, preprocessing="none")
        pictures, regions = pq.read_table(testbed.PICTURES).to_pandas(), testbed.regions()
        self.references = []
        for cluster in rows.cluster:
            data = pictures[pictures.cluster == cluster].image
            made = [np.asarray(Image.open(io.BytesIO(each["bytes"])).convert("RGB")) for each in data]
            self.references.append((np.stack(made), self.describe(made).numpy(), regions.get(cluster)))
        self.before = self.sampler(self.captions)
        self.usual = self.sampler(self.ordinary)

    def usual_loss(self, loss: str, mask: str) -> float:
        """Median first-step loss of the ordinary captions."""
        scores = {**self.usual.first, **self.usual.windows()}
        return float(np.median(scores["magnitude" if loss == "magnitude" else MASK_LOSS[mask]]))

    def images(self, point: Point) -> tuple[Any, dict[str, Any]]:
        """Images of the captions mitigated so, uint8 [N, H, W, 3], and facts of the optimisation."""
        if point.method in LOSSES:
            loss, mask = LOSSES[point.method]
            target = point.setting * self.usual_loss(loss, mask)
            mitigator = Mitigator(self.model, loss, target, steps=self.steps, batch_size=16)  # type: ignore[arg-type]
            masks = getattr(self.before, MASKS[mask])
            moved, made = move_and_sample(mitigator, self.sampler, self.captions, [0] * len(self.captions), masks)
            return made.images, {"target": target, "reached": (moved.last_loss <= target).tolist()}
        if point.method == "rescaled attention":
            prompts = self.model.encode(self.captions)
            noises = self.sampler.noises.expand(len(self.captions), -1, -1, -1)
            with rescaled_attention(self.model.denoiser, prompts.eos_positions, point.setting):
                return self.sampler.sample(prompts, noises)["images"].numpy(), {}
        count = int(point.setting)
        if point.method == "random tokens":
            return self.sampler(insert_random_tokens(self.captions, self.model.pipeline.tokenizer, count)).images, {}
        return self.sampler(insert_random_numbers(self.captions, count)).images, {}

    def measure(self, images: Any) -> dict[str, list[float]]:
        """Of every caption: sscd to the nearest picture of its cluster, copy error in the true region, alignment."""
        vectors = self.describe(list(images)).numpy()
        sscd = [float((pictures[1] @ vector).max()) for vector, pictures in zip(vectors, self.references, strict=True)]
        errors = []
        for image, (pictures, _, region) in zip(images, self.references, strict=True):
            squared = ((image / 255.0 - pictures / 255.0) ** 2).mean(-1)  # [R, H, W]
            inside = squared if region is None else squared[:, region]
            errors.append(float(np.sqrt(inside.reshape(len(pictures), -1).mean(1)).min()))
        return {"sscd": sscd, "copy_error": errors, "alignment": self.clip(list(images), self.captions).tolist()}

    def point(self, point: Point) -> dict[str, Any]:
        """Measure a point, or read it where it was measured before."""
        file = self.folder / f"{point.name}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return dict(json.loads(file.read_text()))
        images, facts = (self.before.images, {}) if point.method == "none" else self.images(point)
        found = {**facts, **self.measure(images)}
        file.with_suffix(".tmp").write_text(json.dumps(found))
        file.with_suffix(".tmp").rename(file)
        return found


def interval(values: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of a mean; `draws` [R, n] are row numbers."""
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def alignment_at(sscd: np.ndarray, alignment: np.ndarray, fall: float) -> float:
    """Alignment where the mean sscd first falls by a share, linear between two strengths; NaN where it never does.

    Args:
        sscd, alignment: means by strength, the unmitigated first, [P]. fall: share of the first sscd.
    """
    level = (1 - fall) * sscd[0]
    below = np.flatnonzero(sscd <= level)
    if not len(below) or below[0] == 0:  # at once only where there was no similarity
        return float("nan")
    at = below[0]
    share = (sscd[at - 1] - level) / (sscd[at - 1] - sscd[at])
    return float(alignment[at - 1] + share * (alignment[at] - alignment[at - 1]))


def compare(found: dict[Point, dict[str, Any]], kinds: np.ndarray, kind: str, fall: float) -> list[dict[str, str]]:
    """Of every method: alignment where similarity has fallen so, and how much more than magnitude's, as text."""
    rows = np.flatnonzero(kinds == kind)
    draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    samples = [np.arange(len(rows)), *draws]  # the first is the sample itself
    every: dict[str, np.ndarray] = {}
    for method in (*LOSSES, *BASELINES):
        points = [point for point in found if point.method in ("none", method)]
        sscd, alignment = (
            np.array([found[point][name] for point in points])[:, rows] for name in ("sscd", "alignment")
        )
        every[method] = np.array([alignment_at(sscd[:, d].mean(1), alignment[:, d].mean(1), fall) for d in samples])
    table = []
    for method, values in every.items():
        more = values - every["magnitude"]
        row = {"method": method, "alignment": span(values[0], *_quantiles(values[1:]))}
        row["more"] = "" if method == "magnitude" else span(more[0], *_quantiles(more[1:]), "+")
        table.append({**row, "reached": f"{np.isfinite(values[1:]).mean():.0%}"})
    return table


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    """95 % of the resamples that have a value; NaN where those are fewer than 90 %."""
    good = values[np.isfinite(values)]
    if len(good) < 0.9 * len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(good, (0.025, 0.975))
    return float(low), float(high)


def write_csv(path: Path, found: dict[Point, dict[str, Any]], kinds: np.ndarray) -> list[dict[str, Any]]:
    """A row a kind and point: means and intervals; returned as well."""
    table = []
    for kind in KINDS:
        rows = np.flatnonzero(kinds == kind)
        draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
        for point, values in found.items():
            row: dict[str, Any] = {
                "kind": kind,
                "method": point.method,
                "setting": point.setting,
                "captions": len(rows),
            }
            row["target"] = values.get("target")
            row["reached"] = sum(np.array(values["reached"])[rows]) if "reached" in values else None
            for name in MEASURES:
                column = np.array(values[name])[rows]
                low, high = interval(column, draws)
                row |= {name: column.mean(), f"{name}_low": low, f"{name}_high": high}
            row["copied"] = int((np.array(values["copy_error"])[rows] < COPIED).sum())
            table.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()})
    return table


def draw(path: Path, table: list[dict[str, Any]], usual: float) -> None:
    """Similarity against alignment, a curve a method, from the unmitigated point on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, kind in zip(axes, KINDS, strict=True):
        rows = [row for row in table if row["kind"] == kind]
        for method in (*LOSSES, *BASELINES):
            curve = [row for row in rows if row["method"] in ("none", method)]
            style = {"marker": "o", "linestyle": "-" if method in LOSSES else ":", "markersize": 4}
            axis.plot([r["alignment"] for r in curve], [r["sscd"] for r in curve], label=method, **style)
        axis.plot(rows[0]["alignment"], rows[0]["sscd"], "ks", label="unmitigated")
        axis.axvline(usual, color="grey", linewidth=0.8, linestyle="--", label="ordinary captions")
        axis.set(title=f"{kind} copies", xlabel="alignment (CLIP cosine)", ylabel="SSCD to the training picture")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_page(path: Path, bench: Bench, table: list[dict[str, Any]], found: dict[Point, Any], command: str) -> None:
    """The figures as Markdown, with the command, machine and date they come from."""
    number = len(bench.captions) // 2
    usual = usual_alignment(bench)
    lines = [
        "# Mitigation: similarity against alignment",
        "",
        f"`{command}`, {os.cpu_count()} CPU cores, no GPU, {datetime.date.today().isoformat()}. The testbed is small "
        f"and not Stable Diffusion: {number} global and {number} local captions that the model copies, one noise each, "
        f"{bench.steps} steps. Brackets are 95 % bootstrap intervals over captions, each of another cluster.",
        "",
        "SSCD is the cosine to the nearest training picture of the caption's cluster; copied counts images with a copy "
        f"error under {COPIED} inside the true region. Alignment is the cosine of image and caption by the testbed's "
        "CLIP, which was trained on these pictures too: a copy of the caption's own picture scores well by it. "
        f"Ordinary captions, never seen in training, have {usual:.3f}. A target is a multiple (setting) of the median "
        "loss of ordinary captions; insertions are a number, rescaled attention a factor of the start-of-text logit.",
        "",
        "![Trade-off](mitigation.png)",
        "",
    ]
    for kind in KINDS:
        lines += [f"## {kind.capitalize()} copies", ""]
        for name, fall in FALLS.items():
            lines += [f"Alignment where the mean SSCD has fallen by {name}, linear between two settings:", ""]
            lines += ["| method | alignment | more than magnitude | resamples that get there |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(row.values()) + " |" for row in compare(found, bench.kinds, kind, fall)]
            lines.append("")
        lines += [
            "| method | setting | SSCD | copied | alignment | target | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (row for row in table if row["kind"] == kind):
            cells = [span(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in ("sscd", "alignment")]
            target = "" if row["target"] is None else f"{row['target']:.2f}"
            reached = "" if row["reached"] is None else f"{row['reached']} of {number}"
            setting = "" if row["method"] == "none" else f"{row['setting']:g}"
            copied = f"{row['copied']} of {number}"
            lines.append(f"| {row['method']} | {setting} | {cells[0]} | {copied} | {cells[1]} | {target} | {reached} |")
        lines.append("")
    path.write_text("\n".join(lines))


def usual_alignment(bench: Bench) -> float:
    """Mean alignment of the images of ordinary captions."""
    assert bench.usual.images is not None
    return float(bench.clip(list(bench.usual.images), bench.ordinary).mean())


def span(value: float, low: float, high: float, sign: str = "") -> str:
    """A figure with its interval; a dash where it does not exist."""
    if not np.isfinite(value):
        return "-"
    return f"{value:{sign}.3f}" + (f" [{low:{sign}.3f}, {high:{sign}.3f}]" if np.isfinite(low) else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "be-audit-tradeoff")
    parser.add_argument("--docs", type=Path, help="default the checkout's docs; with --quick, --work")
    parser.add_argument("--captions", type=int, default=8, help="of each kind")
    parser.add_argument("--quick", action="store_true", help="few captions, steps and points: does it run?")
    args = parser.parse_args(arguments)
    bench = Bench(args.work, *((2, 2, 4) if args.quick else (args.captions, 50, 24)))
    settings: dict[str, Sequence[float]] = {**dict.fromkeys(LOSSES, FACTORS), **BASELINES}
    if args.quick:
        settings = {method: values[-1:] for method, values in settings.items()}
    points = [Point("none", 0.0), *(Point(method, each) for method in settings for each in settings[method])]
    found: dict[Point, dict[str, Any]] = {}
    with Progress(len(points), "points", "trade-off") as progress:
        for point in points:
            found[point] = bench.point(point)
            progress.add(1)
    folder = (args.docs or (args.work if args.quick else DOCS)) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    table = write_csv(folder / "mitigation.csv", found, bench.kinds)
    draw(folder / "mitigation.png", table, usual_alignment(bench))
    command = "python -m tests.benchmarks.tradeoff" + (" --quick" if args.quick else f" --captions {args.captions}")
    write_page(folder / "mitigation.md", bench, table, found, command)
    print(f"{folder}/mitigation.md, .csv and .png")


if __name__ == "__main__":
    main()
