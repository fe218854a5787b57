"""Attention capture: what it reads, and that the model never notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import MaskSource, find_model, load
from pipelines.attention import capture_attention, cross_attention_layers, paper_layers
from tests.reference import Reference

CAPTIONS = ["a red house", "two dogs on a very long green street"]
SHAPES = ("sd1", "sd2", "sdxl", "testbed")


def hook_count(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.denoiser.modules() for kind in kinds)


@pytest.mark.parametrize("kind", SHAPES)
def test_output_is_bit_identical_and_hooks_leave(model_folders: dict[str, Path], kind: str) -> None:
    model = load(find_model(str(model_folders[kind])), "cpu", "float32")
    prompts, latents = model.encode(CAPTIONS), model.noise_bank(2, 0)
    layers = tuple(cross_attention_layers(model.denoiser))
    with torch.inference_mode():
        plain = model.predict(latents, model.levels(50)[0], prompts)
        with capture_attention(
            model.denoiser, layers, prompts.eos_positions, model.latent_shape[1:], token_layers=layers
        ) as seen:
            watched = model.predict(latents, model.levels(50)[0], prompts)
            assert hook_count(model) > 0
    assert torch.equal(plain, watched)
    assert set(seen.masks) == set(seen.token_means) == set(layers)
    assert hook_count(model) == 0
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        capture_attention(model.denoiser, layers, prompts.eos_positions, model.latent_shape[1:]),
    ):
        raise RuntimeError("out of memory")
    assert hook_count(model) == 0


def test_hooks_leave_when_the_model_fails(model_folders: dict[str, Path]) -> None:
    model = load(find_model(str(model_folders["sd1"])), "cpu", "float32")
    prompts = model.encode(CAPTIONS)
    with (
        pytest.raises(RuntimeError),
        capture_attention(model.denoiser, paper_layers(model.denoiser), prompts.eos_positions, model.latent_shape[1:]),
    ):
        model.predict(torch.zeros(2, 3, 16, 16), model.levels(50)[0], prompts)  # three channels where it takes four
    assert hook_count(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_every_layer_is_an_explicit_softmax(model_folders: dict[str, Path], kind: str) -> None:
    """Layers of every resolution, their mask and their attention over tokens."""
    model, reference = load(find_model(str(model_folders[kind])), "cpu", "float32"), Reference(model_folders[kind])
    prompts, noises = model.encode(CAPTIONS), model.noise_bank(1, 4)
    layers = tuple(cross_attention_layers(model.denoiser))
    assert {f"{name}.processor" for name in layers} == set(reference.attention)
    with (
        torch.inference_mode(),
        capture_attention(
            model.denoiser, layers, prompts.eos_positions, model.latent_shape[1:], token_layers=layers
        ) as seen,
    ):
        model.predict(noises.expand(2, -1, -1, -1), model.levels(50)[0], prompts)
    for row, caption in enumerate(CAPTIONS):
        prompt = reference.encode(caption)
        reference.output(noises[0], 981, prompt)
        for name in layers:
            probabilities = reference.attention[f"{name}.processor"].probabilities
            mask, mean = probabilities.mean(0)[:, prompt.eos], probabilities.mean((0, 1))
            np.testing.assert_allclose(seen.masks[name][row].flatten().numpy(), mask.numpy(), atol=1e-5)
            np.testing.assert_allclose(seen.token_means[name][row].numpy(), mean.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind, block", [("sd1", 0), ("sd2", 0), ("sdxl", 1), ("testbed", 0)])
def test_the_papers_layers(model_folders: dict[str, Path], kind: str, block: int) -> None:
    unet = load(find_model(str(model_folders[kind])), "cpu", "float32").denoiser
    expected = tuple(f"down_blocks.{block}.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1))
    assert paper_layers(unet) == expected


def test_layers_that_are_not_there_are_named(model_folders: dict[str, Path]) -> None:
    unet = load(find_model(str(model_folders["sd1"])), "cpu", "float32").denoiser
    named = r"no attention layer 'down_blocks\.7.*it has down_blocks\.0"
    with (
        pytest.raises(ValueError, match=named),
        capture_attention(unet, ("down_blocks.7.attn2",), torch.tensor([3]), (16, 16)),
    ):
        pass


def test_mask_of_latents_that_are_not_square(model_folders: dict[str, Path]) -> None:
    """A U-Net for wide pictures: the map keeps the latents' aspect, halved with rounding up as the U-Net does."""
    model = load(find_model(str(model_folders["sd1"])), "cpu", "float32")
    prompts = model.encode(CAPTIONS[:1])
    layers = tuple(cross_attention_layers(model.denoiser))
    with torch.inference_mode(), capture_attention(model.denoiser, layers, prompts.eos_positions, (10, 22)) as seen:
        model.predict(torch.randn(1, 4, 10, 22), model.levels(50)[0], prompts)
    assert {tuple(mask.shape) for mask in seen.masks.values()} == {(1, 10, 22), (1, 5, 11)}
    assert seen.mask((10, 22)).shape == (1, 10, 22)


@pytest.mark.parametrize(
    "source, text",
    [
        (MaskSource(), "first:eos"),
        (MaskSource("final", "bos"), "final:bos"),
        (MaskSource("energy"), "energy"),
        (MaskSource("first", "padding", ("a.attn2", "b.attn2")), "first:padding:a.attn2+b.attn2"),
    ],
)
def test_mask_sources_say_what_they_are(source: MaskSource, text: str) -> None:
    assert source.describe() == text


@pytest.mark.parametrize("bad", [{"step": "second"}, {"token": "comma"}])
def test_unknown_mask_sources_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        MaskSource(**bad)
