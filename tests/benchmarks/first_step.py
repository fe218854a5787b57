"""First-step scores of a network of Stable Diffusion 1's shape: captions a second, and the share of the machine's peak.

The U-Net of 860 million parameters and the text encoder (CLIP ViT-L/14's) are built from their configurations with
random weights: nothing is downloaded, and speed does not depend on values. float16 on CUDA, float32 elsewhere. Measured
in turns, in one process: the loop of research code (one prompt at a time, the pair of classifier-free guidance through
diffusers' own call), FirstStepScorer in batches, and the same under what torch offers beside. The peak is a matrix
product of the same dtype. A CPU has one thread, and CPU seconds, so that other work on the machine does not enter;
with --threads they are seconds of the clock.

Run: python -m tests.benchmarks.first_step [--shape full|small|tiny] [--captions N] [--batch-sizes 32 64 128]
     [--rounds 3] [--settings channels_last compile float16 bfloat16 float8] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import pipelines.compiled
from audit import testbed
from pipelines import DiffusionModel, FirstStepScorer, formulas
from pipelines.compiled import CompiledPart, compile_denoiser
from pipelines.families.stable_diffusion import StableDiffusion
from pipelines.float8 import to_float8
from pipelines.loading import DTYPES, find_device, resolve_dtype
from tests.tiny import SCHEDULE

SHAPES: dict[str, dict[str, Any]] = {
    "full": {"channels": (320, 640, 1280, 1280), "latents": 64, "text": (768, 12, 12)},
    "small": {"channels": (96, 192, 384, 384), "latents": 32, "text": (256, 4, 4)},
    "tiny": {"channels": (32, 64, 64, 64), "latents": 16, "text": (64, 2, 2)},
}
"""Channels of the U-Net's blocks, side of the latents; width, layers and heads of the text encoder."""
Setting = Callable[[DiffusionModel], AbstractContextManager[None]]


def unet_of(shape: str) -> UNet2DConditionModel:
    """Stable Diffusion 1's U-Net, or a narrower one of the same blocks, on the default device."""
    sizes = SHAPES[shape]
    return UNet2DConditionModel(
        sample_size=sizes["latents"],
        block_out_channels=sizes["channels"],
        cross_attention_dim=sizes["text"][0],
        attention_head_dim=8,
    )


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
    """Stable Diffusion 1's networks with random weights and the testbed's tokenizer."""
    width, layers, heads = SHAPES[shape]["text"]
    tokenizer = CLIPTokenizer.from_pretrained(testbed.PIPELINE / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            unet, encoder, vae = unet_of(shape), CLIPTextModel(text), AutoencoderKL()
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline = StableDiffusionPipeline(
        unet=unet.eval().requires_grad_(False),
        text_encoder=encoder.eval().requires_grad_(False),
        vae=vae,  # plays no part at the first step
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusion(pipeline, device, dtype, f"random {shape}")


def evaluation_flops(shape: str) -> int:
    """FLOPs of one latent through the U-Net once, counted by torch without computing any."""
    with torch.device("meta"):
        unet, side = unet_of(shape), SHAPES[shape]["latents"]
        latents, text = torch.empty(1, 4, side, side), torch.empty(1, 77, SHAPES[shape]["text"][0])
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            unet(latents, torch.empty(1), encoder_hidden_states=text)
    return counter.get_total_flops()


@torch.inference_mode()
def guidance_loop(model: DiffusionModel, captions: list[str], noise: torch.Tensor) -> np.ndarray:
    """The magnitude as research code computes it: both embeddings and both halves of guidance anew for every prompt."""
    level, found = model.levels(50)[0], []
    for caption in captions:
        conditional, uncond, *_ = model.pipeline.encode_prompt(
            caption, device=model.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        both, latents = torch.cat([uncond, conditional]), torch.cat([noise, noise])
        output = model.denoiser(latents, level.timestep, encoder_hidden_states=both, return_dict=False)[0]
        found.append(float(formulas.magnitude(formulas.energy_map(output[1:] - output[:1]))))
    return np.array(found)


@contextmanager
def channels_last(model: DiffusionModel) -> Iterator[None]:
    """Convolutions on pixels whose channels lie side by side."""
    model.denoiser.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.denoiser.to(memory_format=torch.contiguous_format)


@contextmanager
def compiled(model: DiffusionModel) -> Iterator[None]:
    """As `--compile`, without waiting for a shape to come often; what is said of parts that fail goes to stderr."""
    if not _compiled:
        pipelines.compiled.AFTER = 1
        _compiled.extend(compile_denoiser(model, lambda line: print(line, file=sys.stderr)))
    for each in _compiled:
        each.part.forward = each
    try:
        yield
    finally:
        for each in _compiled:
            del each.part.forward


_compiled: list[CompiledPart] = []


@contextmanager
def of_type(dtype: torch.dtype, model: DiffusionModel) -> Iterator[None]:
    """The weights in another type."""
    kept = model.dtype
    for wanted in (dtype, kept):
        model.denoiser.to(wanted)
        model.pipeline.text_encoder.to(wanted)
        model.dtype = wanted
        if wanted is dtype:
            yield


@contextmanager
def float8(model: DiffusionModel) -> Iterator[None]:
    """Attention and feed-forward in eight bits, all else in bfloat16, as `--dtype float8`."""
    with of_type(torch.bfloat16, model):
        before = {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)}
        to_float8(model.denoiser)
        try:
            yield
        finally:
            for name, layer in before.items():
                parent, _, last = name.rpartition(".")
                setattr(model.denoiser.get_submodule(parent), last, layer)


SETTINGS: dict[str, Setting] = {
    "channels_last": channels_last,
    "compile": compiled,
    "float16": partial(of_type, torch.float16),
    "bfloat16": partial(of_type, torch.bfloat16),
    "float8": float8,
}


def matrix_peak(dtype: torch.dtype, seconds: Callable[[Callable[[], Any]], float], device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: torch.mm(left, right)) for _ in range(8))


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--captions", type=int, default=256 if cuda else 2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32] if cuda else [2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["channels_last", "compile"])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads or 1)
    clock = time.perf_counter if cuda or options.threads else time.process_time

    def seconds(work: Callable[[], Any]) -> float:
        started = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        return clock() - started

    device = find_device("cuda" if cuda else "cpu")
    dtype = DTYPES[resolve_dtype("auto", device)]
    model = random_model(options.shape, device, dtype)
    captions = list(dict.fromkeys(pq.read_table(testbed.CAPTIONS)["TEXT"].to_pylist()))[: options.captions]
    noise, found = model.noise_bank(1, 0).to(device, dtype), {}

    def scored(name: str, setting: Setting, batch: int) -> float:
        with setting(model):
            scorer = FirstStepScorer(model, batch_size=batch)
            if name not in taken:  # warm
                scorer(captions[:batch])

            def work() -> None:
                found[name] = scorer(captions).scores

            return seconds(work)

    def looped() -> float:
        def work() -> None:
            found["loop"] = {"magnitude": guidance_loop(model, captions, noise)}

        return seconds(work)

    turns: dict[str, tuple[int, Callable[[], float]]] = {"loop": (2, looped)}  # evaluations a caption
    plain = f"batches of {options.batch_sizes[0]}"
    for batch in options.batch_sizes:
        name = f"batches of {batch}"
        turns[name] = (1, partial(scored, name, nullcontext, batch))
    for name in options.settings:
        turns[name] = (1, partial(scored, name, SETTINGS[name], options.batch_sizes[0]))
    taken: dict[str, list[float]] = {}
    peaks = []
    for _ in range(options.rounds):
        peaks.append(matrix_peak(dtype, seconds, device))
        for name, (_, turn) in turns.items():
            spent = turn()
            taken.setdefault(name, []).append(spent)
    peak, flops = max(peaks), evaluation_flops(options.shape)

    rows = []
    for name, (evaluations, _) in turns.items():
        rate = len(captions) / statistics.median(taken[name])
        work = rate * evaluations * flops
        apart = max(float(np.abs(value / found[plain][score] - 1).max()) for score, value in found[name].items())
        ratio = rate * statistics.median(taken["loop"]) / len(captions)
        rows.append((name, f"{rate:.4g}", f"{ratio:.2f}", f"{work / 1e12:.3g}", f"{work / peak:.0%}", f"{apart:.1e}"))
    where = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    how = "seconds of the clock" if clock is time.perf_counter else "CPU seconds of one thread"
    print(
        f"{options.shape} shape, {sum(part.numel() for part in model.denoiser.parameters()) / 1e6:.0f} M parameters, "
        f"{flops / 1e9:.0f} GFLOP an evaluation, {str(dtype).removeprefix('torch.')}; {len(captions)} captions, "
        f"medians of {options.rounds} turns, {how}; {where}; matrix product {peak / 1e12:.3g} TFLOP/s\n"
    )
    head = ["", "captions/s", "times the loop", "TFLOP/s of the U-Net", "share of peak", "largest relative difference"]
    print(pd.DataFrame(rows, columns=head).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
