"""Baseline mitigations: what is inserted where, and rescaled attention against attention computed by hand."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import DiffusionModel, TrajectorySampler, find_model, load
from pipelines.attention import cross_attention_layers
from pipelines.baselines import insert_random_numbers, insert_random_tokens, rescaled_attention
from tests.tiny import save_model

CAPTION = "a very long green street"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load(find_model(str(save_model("sd1", tmp_path_factory.mktemp("models") / "sd1"))), "cpu", "float32")


def test_numbers_go_between_words_that_stay_in_order() -> None:
    captions = [f"{CAPTION} {n}th" for n in range(300)]
    places, numbers = Counter(), []
    for caption, found in zip(captions, insert_random_numbers(captions, count=1), strict=True):
        words, kept = found.split(" "), caption.split(" ")
        place = next(i for i in range(len(words)) if words[:i] + words[i + 1 :] == kept)
        places[place] += 1
        numbers.append(int(words[place]))
    assert set(places) == set(range(7))  # before, between and after, each about 300 / 7 times
    assert min(places.values()) > 15
    assert 0 <= min(numbers) < 2_000 and 98_000 < max(numbers) < 100_000
    assert 40_000 < np.mean(numbers) < 60_000


def test_counts_seeds_and_batches(sd1: DiffusionModel) -> None:
    found = insert_random_numbers([CAPTION, "another"], count=4, seed=1)
    assert [len(re.findall(r"\b\d+\b", caption)) for caption in found] == [4, 4]
    assert insert_random_numbers(["another", CAPTION], count=4, seed=1) == found[::-1]
    assert insert_random_numbers([CAPTION], count=4, seed=2) != found[:1]
    tokens = insert_random_tokens([CAPTION, "another"], sd1.pipeline.tokenizer, count=2, seed=1)
    assert insert_random_tokens(["another"], sd1.pipeline.tokenizer, count=2, seed=1) == tokens[1:]
    assert insert_random_numbers([CAPTION], count=0) == [CAPTION]


def test_tokens_come_from_the_whole_vocabulary_without_the_special_ones(sd1: DiffusionModel) -> None:
    captions = [f"caption-{n}" for n in range(400)]
    found = insert_random_tokens(captions, sd1.pipeline.tokenizer, count=1)
    inserted = [
        text.removeprefix(f"{caption} ") if text.startswith(caption) else text.removesuffix(f" {caption}")
        for text, caption in zip(found, captions, strict=True)
    ]
    words = {sd1.pipeline.tokenizer.decode([number]) for number in range(len(sd1.pipeline.tokenizer))}
    special = {sd1.pipeline.tokenizer.decode([number]) for number in sd1.pipeline.tokenizer.all_special_ids}
    assert set(inserted) <= words - special
    assert len(set(inserted)) > 250


def by_hand(model: DiffusionModel, name: str, x: torch.Tensor, text: torch.Tensor, kept: list[int], factor: float):
    """One layer's output, row by row and head by head, from the definition."""
    layer = model.denoiser.get_submodule(name)
    out = []
    for row in range(len(x)):
        q, k, v = layer.to_q(x[row]), layer.to_k(text[row, : kept[row]]), layer.to_v(text[row, : kept[row]])
        width = q.shape[1] // layer.heads
        heads = []
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[:, part] @ k[:, part].T / width**0.5
            logits[:, 0] *= factor if row >= len(x) // 2 else 1.0  # the unconditional half comes first
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            heads.append(weights @ v[:, part])
        out.append(layer.to_out[0](torch.cat(heads, 1)))
    return torch.stack(out)


@pytest.mark.parametrize("keep_eos", [True, False])
def test_rescaled_attention_is_the_definition_in_every_layer(sd1: DiffusionModel, keep_eos: bool) -> None:
    prompts = sd1.encode([CAPTION, "cat"])
    both = prompts.concatenate([sd1.encode_empty().expand(2), prompts])
    latents = sd1.noise_bank(2, 0)
    kept = [int(eos) + keep_eos for eos in prompts.eos_positions] * 2
    layers, seen = cross_attention_layers(sd1.denoiser), {}
    handles = [
        sd1.denoiser.get_submodule(name).register_forward_hook(
            lambda _, args, options, output, name=name: seen.update({name: (args[0], output)}), with_kwargs=True
        )
        for name in layers
    ]
    with torch.no_grad(), rescaled_attention(sd1.denoiser, prompts.eos_positions, 1.25, keep_eos):
        sd1.predict(torch.cat([latents, latents]), sd1.levels(4)[0], both)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers) > 4
    with torch.no_grad():
        for name, (x, output) in seen.items():
            torch.testing.assert_close(output, by_hand(sd1, name, x, both.hidden, kept, 1.25), rtol=1e-4, atol=1e-5)


def test_masked_tokens_do_nothing_and_the_model_is_left_as_it_was(sd1: DiffusionModel) -> None:
    sampler = TrajectorySampler(sd1, steps=2)
    prompts, latents = sd1.encode([CAPTION]), sampler.noises[:1]
    hidden = prompts.hidden.clone()
    hidden[:, int(prompts.eos_positions[0]) + 1 :] += 3.0
    before = sampler.sample(prompts, latents)
    with rescaled_attention(sd1.denoiser, prompts.eos_positions):
        rescaled = sampler.sample(prompts, latents)
        padding_changed = sampler.sample(replace(prompts, hidden=hidden), latents)
    after = sampler.sample(prompts, latents)
    assert torch.equal(rescaled["images"], padding_changed["images"])
    assert not torch.equal(before["magnitude_t"], rescaled["magnitude_t"])
    assert torch.equal(before["magnitude_t"], after["magnitude_t"])
    # nothing to mask and a factor of one: the model's own attention
    last = torch.full_like(prompts.eos_positions, prompts.hidden.shape[1] - 1)
    with rescaled_attention(sd1.denoiser, last, bos_factor=1.0):
        same = sampler.sample(prompts, latents)
    torch.testing.assert_close(same["magnitude_t"], before["magnitude_t"], rtol=1e-4, atol=1e-5)


def test_a_call_for_other_prompts_is_refused(sd1: DiffusionModel) -> None:
    prompts = sd1.encode(["cat"])
    with (
        rescaled_attention(sd1.denoiser, sd1.encode(["a", "b"]).eos_positions),
        pytest.raises(ValueError, match="1 rows in rescaled_attention of 2 prompts"),
    ):
        sd1.predict(sd1.noise_bank(1, 0), sd1.levels(4)[0], prompts)
