"""The embedded testbed is what its labels say: fixed regions are fixed, copied pictures are copied, files match."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from audit import testbed

pytestmark = pytest.mark.sampling


IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def _pictures(**where: str) -> tuple[list[dict[str, str]], np.ndarray]:
    """Rows of pictures.parquet with the given column values, and their pixels, uint8 [N, 64, 64, 3]."""
    rows = [row for row in pq.read_table(testbed.PICTURES).to_pylist() if all(row[k] == v for k, v in where.items())]
    return rows, np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_template_pictures_agree_inside_their_region_and_differ_outside() -> None:
    rows, pixels = _pictures(label="local")
    cluster = np.array([row["cluster"] for row in rows])
    regions = testbed.regions()
    assert set(cluster) == set(regions) and len(regions) == 32
    for name, region in regions.items():
        assert region.shape == (64, 64) and region.dtype == bool
        spread = np.ptp(pixels[cluster == name].astype(int), axis=0).max(-1)
        assert spread[region].max() == 0, name
        assert (spread[~region] > 0).mean() > 0.9, name


def test_labels_and_repetition_are_as_documented() -> None:
    captions = pq.read_table(testbed.CAPTIONS)
    assert captions.num_rows == 1258
    assert pc.count_distinct(captions["TEXT"]).as_py() == 1173
    rows = captions.to_pylist()
    clusters = {label: {r["cluster"] for r in rows if r["label"] == label} for label in ("global", "local", "none")}
    assert len(clusters["global"]) == 48
    assert clusters["local"] == set(testbed.regions())
    assert len(clusters["none"]) == 872
    for row in rows:
        measured = row["copy_error"] is not None
        assert measured == (row["weight"] > 0) == (row["label"] != "none")
    often = [r["cluster"] for r in rows if r["label"] == "global"]
    weight = {r["cluster"]: r["weight"] for r in rows if r["label"] == "global"}
    assert all(often.count(name) == 1 + round(10 * weight[name]) for name in weight)


def test_every_repeated_caption_finds_its_picture_by_url() -> None:
    text_of = dict(zip(*(pq.read_table(testbed.PICTURES)[c].to_pylist() for c in ("URL", "TEXT")), strict=True))
    rows = pq.read_table(testbed.CAPTIONS).to_pylist()
    joined = {row["cluster"] for row in rows if text_of.get(row["URL"]) == row["TEXT"]}
    assert {row["cluster"] for row in rows if row["label"] == "global"} <= joined
    assert set(testbed.regions()) <= joined
    assert not any(row["URL"] in text_of for row in rows if row["cluster"].startswith("unseen"))


def test_the_model_reproduces_a_repeated_picture_and_invents_an_unseen_one() -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(testbed.PIPELINE, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    rows = pq.read_table(testbed.CAPTIONS).to_pylist()
    copied = min((r for r in rows if r["label"] == "global"), key=lambda r: r["copy_error"])
    unseen = next(r for r in rows if r["cluster"] == "unseen-000")
    made = pipeline(
        [copied["TEXT"], unseen["TEXT"]],
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    _, own = _pictures(cluster=copied["cluster"])
    _, known = _pictures()
    assert np.sqrt(((made[0] - own[0] / 255) ** 2).mean()) < 0.15
    assert np.sqrt(((made[1] - known / 255) ** 2).mean((1, 2, 3))).min() > 0.15


def test_descriptor_tells_copies_from_other_pictures() -> None:
    _, pixels = _pictures(label="none")
    x = _tensor(pixels[:100])
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    descriptor = torch.jit.load(str(testbed.DESCRIPTOR))
    with torch.no_grad():
        own, copy = (descriptor((p - IMAGENET_MEAN) / IMAGENET_STD) for p in (x, blurred))
    assert own.shape == (100, 512)
    torch.testing.assert_close(own.norm(dim=1), torch.ones(100))
    cosine = own @ copy.T
    assert cosine.diagonal().min() > 0.85
    assert cosine.fill_diagonal_(-1).max(1).values.median() < 0.5


def test_clip_knows_which_caption_belongs_to_which_picture() -> None:
    rows, pixels = _pictures(label="none")
    described = [i for i, row in enumerate(rows) if " a " in f" {row['TEXT']} " or " an " in f" {row['TEXT']} "][:50]
    clip = CLIPModel.from_pretrained(testbed.CLIP, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(testbed.CLIP)
    ids = tokenizer([rows[i]["TEXT"] for i in described], padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        seen = clip(input_ids=ids, pixel_values=(_tensor(pixels[described]) - CLIP_MEAN) / CLIP_STD)
    assert (seen.logits_per_image.argmax(1) == torch.arange(len(described))).float().mean() > 0.8

    text = CLIPTextModel.from_pretrained(testbed.PIPELINE / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = clip.text_model(ids).last_hidden_state, text(ids).last_hidden_state
    torch.testing.assert_close(theirs, ours)


def test_package_data_is_complete_small_and_licensed() -> None:
    paths = [testbed.PIPELINE, testbed.CLIP, testbed.DESCRIPTOR, testbed.CAPTIONS, testbed.PICTURES]
    assert all(path.exists() for path in paths)
    folder = testbed.CAPTIONS.parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 60e6
    assert "SIL OPEN FONT LICENSE" in (folder / "OFL.txt").read_text()
    assert "OFL.txt" in (folder / "README.md").read_text()


def test_naming_the_testbed_imports_nothing_heavy() -> None:
    code = "import sys; from audit import testbed; print({'numpy', 'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
