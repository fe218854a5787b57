"""CLIP score: the testbed's CLIP knows its pictures, preprocessing is CLIP's, mistakes are named."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from audit import testbed
from pipelines.alignment import ClipScore, load_clip
from pipelines.loading import ModelError


@pytest.fixture(scope="module")
def clip() -> ClipScore:
    return load_clip(testbed.CLIP, "cpu")


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Image.Image], list[str]]:
    table = pq.read_table(testbed.PICTURES, columns=["image", "TEXT", "label"]).slice(0, 400).to_pylist()
    rows = [row for row in table if row["label"] == "none"][:40] or table[:40]
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows], [row["TEXT"] for row in rows]


@pytest.mark.sampling
def test_pairs_score_above_shuffled_pairs(clip: ClipScore, pairs: tuple[list[Image.Image], list[str]]) -> None:
    images, captions = pairs
    own, other = clip(images, captions), clip(images, captions[1:] + captions[:1])
    assert own.dtype == np.float32 and np.abs(own).max() <= 1
    assert own.mean() > other.mean() + 0.1
    np.testing.assert_allclose(clip(images, captions, batch_size=7), own, atol=1e-5)
    np.testing.assert_allclose(clip([np.asarray(image.convert("RGB")) for image in images], captions), own, atol=1e-6)


def plainly_prepared(image: Image.Image, side: int) -> torch.Tensor:
    """CLIP's preprocessing written out: shorter side bicubic, centre crop, OpenAI's means; [3, side, side]."""
    picture, short = image.convert("RGB"), min(image.size)
    width, height = (max(side, int(side * each / short)) for each in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(picture)[top : top + side, left : left + side] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


def test_scores_are_those_of_the_model_on_plainly_prepared_pictures(clip: ClipScore) -> None:
    rng = np.random.default_rng(0)
    # any sizes and modes
    images = [
        Image.fromarray(rng.integers(0, 255, (90, 130, 3), np.uint8)),
        Image.fromarray(rng.integers(0, 255, (30, 20), np.uint8)),
        Image.fromarray(rng.integers(0, 255, (64, 64, 4), np.uint8)),
    ]
    captions = ["a cat", "word " * 200, ""]
    pixels = torch.stack([plainly_prepared(image, 64) for image in images])
    model = CLIPModel.from_pretrained(testbed.CLIP, dtype=torch.float32).eval().requires_grad_(False)
    tokens = CLIPTokenizer.from_pretrained(testbed.CLIP)(
        captions, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    output = model(pixel_values=pixels, **tokens)
    expected = (output.logits_per_image / model.logit_scale.exp()).diagonal()
    np.testing.assert_allclose(clip(images, captions), expected.numpy(), atol=1e-5)


def test_means_are_read_from_the_folder_where_it_has_them(tmp_path: Path, clip: ClipScore) -> None:
    folder = shutil.copytree(testbed.CLIP, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    other = load_clip(folder, "cpu")
    assert (list(other.processor.image_mean), list(other.processor.image_std)) == ([0.5] * 3, [0.2] * 3)
    grey = [np.full((64, 64, 3), 128, np.uint8)]
    assert abs(other(grey, ["a cat"])[0] - clip(grey, ["a cat"])[0]) > 1e-4


def test_mistakes_are_named(tmp_path: Path, clip: ClipScore) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ModelError, match="'siglip'"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        clip([np.zeros((4, 4, 3), np.uint8)], ["a", "b"])
    assert len(clip([], [])) == 0
