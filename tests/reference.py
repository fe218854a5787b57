"""The formulas once more, as slowly and plainly as possible: what the scorers are tested against.

One prompt and one noise at a time, two separate U-Net calls, attention computed head by head with an explicit softmax
by a processor of its own, the schedule and the DDIM step written out. Nothing here comes from `pipelines`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor


class ExplicitAttention:
    """softmax(Q K^T / sqrt(d)) V head by head, keeping the probabilities: [heads, HW, L] of the last call."""

    def __init__(self) -> None:
        self.probabilities = torch.empty(0)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        assert len(hidden_states) == 1, "the reference takes one latent at a time"
        query = attn.to_q(hidden_states)[0]
        key, value = attn.to_k(encoder_hidden_states)[0], attn.to_v(encoder_hidden_states)[0]
        width = query.shape[-1] // attn.heads
        probabilities, outputs = [], []
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[:, part] @ key[:, part].T / math.sqrt(width)
            exponent = torch.exp(logits - logits.max(-1, keepdim=True).values)  # without the shift exp overflows
            probability = exponent / exponent.sum(-1, keepdim=True)
            probabilities.append(probability)
            outputs.append(probability @ value[:, part])
        self.probabilities = torch.stack(probabilities)
        return attn.to_out[0](torch.cat(outputs, -1))[None]


@dataclass
class Prompt:
    """A prompt as the U-Net takes it, and where its tokens are."""

    hidden: Tensor
    pooled: Tensor | None
    eos: int
    num_tokens: int
    truncated: bool


class Reference:
    """A pipeline's folder, scored by hand."""

    def __init__(self, folder: Path, guidance_scale: float = 7.5) -> None:
        self.pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        self.guidance_scale = guidance_scale
        self.xl = hasattr(self.pipeline, "text_encoder_2")
        unet, config = self.pipeline.unet, self.pipeline.scheduler.config
        self.v_prediction = config.prediction_type == "v_prediction"
        root = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
        betas = torch.linspace(*root, config.num_train_timesteps, dtype=torch.float32) ** 2
        assert config.beta_schedule == "scaled_linear" and not config.set_alpha_to_one
        self.alpha_bar = torch.cumprod(1 - betas, 0)
        self.train_steps, self.offset = config.num_train_timesteps, config.steps_offset
        self.attention = {name: ExplicitAttention() for name in unet.attn_processors if "attn2" in name}
        unet.set_attn_processor({**unet.attn_processors, **self.attention})
        block = 1 if self.xl else 0
        self.layers = [f"down_blocks.{block}.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
        self.side = unet.config.sample_size

    def noises(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (count, self.pipeline.unet.config.in_channels, self.side, self.side)
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def timesteps(self, steps: int) -> list[int]:
        """Leading spacing, highest first: 981, 961, ... 1 for 50 steps with offset 1."""
        return [i * (self.train_steps // steps) + self.offset for i in reversed(range(steps))]

    @torch.no_grad()
    def encode(self, caption: str) -> Prompt:
        tokenizer, length = self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length
        whole = tokenizer(caption, truncation=False)["input_ids"]
        ids = whole if len(whole) <= length else [*whole[: length - 1], tokenizer.eos_token_id]
        eos = ids.index(tokenizer.eos_token_id)
        facts = (eos, len(whole) - 2, len(whole) > length)

        def padded(pad: int) -> Tensor:
            return torch.tensor([ids + [pad] * (length - len(ids))])

        first = padded(tokenizer.pad_token_id)
        if not self.xl:
            return Prompt(self.pipeline.text_encoder(first)[0], None, *facts)
        second = padded(self.pipeline.tokenizer_2.pad_token_id)
        one = self.pipeline.text_encoder(first, output_hidden_states=True)
        two = self.pipeline.text_encoder_2(second, output_hidden_states=True)
        hidden, pooled = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds
        if caption == "":
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        return Prompt(hidden, pooled, *facts)

    @torch.no_grad()
    def output(self, latents: Tensor, timestep: int, prompt: Prompt) -> Tensor:
        """The U-Net's raw output for one latent [C, H, W]."""
        extra: dict[str, Any] = {}
        if self.xl:
            pixels = float(self.side * self.pipeline.vae_scale_factor)
            ids = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]])
            extra["added_cond_kwargs"] = {"text_embeds": prompt.pooled, "time_ids": ids}
        unet = self.pipeline.unet
        return unet(latents[None], timestep, encoder_hidden_states=prompt.hidden, **extra).sample[0]

    def noise(self, output: Tensor, latents: Tensor, timestep: int) -> Tensor:
        a = self.alpha_bar[timestep]
        return torch.sqrt(a) * output + torch.sqrt(1 - a) * latents if self.v_prediction else output

    def mask(self, prompt: Prompt, token: str = "eos", layers: list[str] | None = None) -> Tensor:
        """The mask of the last U-Net call, [H, W]."""
        masks = []
        for name in layers or self.layers:
            mean = self.attention[f"{name}.processor"].probabilities.mean(0)  # [HW, L]
            if token == "eos":
                column = mean[:, prompt.eos]
            elif token == "bos":
                column = 1 - mean[:, 0]
            else:
                column = mean[:, prompt.eos :].sum(-1)
            side = math.isqrt(len(column))
            grid = column.reshape(1, 1, side, side)
            full = torch.nn.functional.interpolate(grid, size=(self.side, self.side), mode="bilinear")
            masks.append(full[0, 0])
        return sum(masks) / len(masks)  # type: ignore[return-value]

    def entropy(self) -> float:
        """Entropy of the last call's mean attention over tokens; NaN without Ren et al.'s layer."""
        layer = self.attention.get("down_blocks.1.attentions.1.transformer_blocks.0.attn2.processor")
        if layer is None:
            return math.nan
        mean = layer.probabilities.mean((0, 1)).double()
        return float(-(mean * mean.log()).sum())

    def score(
        self,
        caption: str,
        num_noises: int = 1,
        seed: int = 0,
        steps: int = 50,
        token: str = "eos",
        layers: list[str] | None = None,
        mask: str = "first",
    ) -> dict[str, Any]:
        """Every first-step column of one caption."""
        prompt, empty = self.encode(caption), self.encode("")
        t, low = self.timesteps(steps)[0], self.timesteps(steps)[-3]
        found: dict[str, list[Any]] = {}
        for x in self.noises(num_noises, seed):
            uncond = self.noise(self.output(x, t, empty), x, t)
            conditional = self.noise(self.output(x, t, prompt), x, t)
            entropy, attention = self.entropy(), self.mask(prompt, token, layers)
            d = conditional - uncond
            smoothed = smooth(d.square().sum(0))
            m = smoothed if mask == "energy" else attention
            guided = uncond + self.guidance_scale * d
            uncond_low = self.noise(self.output(x, low, empty), x, low)
            d_low = self.noise(self.output(x, low, prompt), x, low) - uncond_low
            sigma_squared = float((1 - self.alpha_bar[-1]) / self.alpha_bar[-1])
            row = {
                "magnitude": float(d.norm()),
                "ld": float((d * m).norm() / m.mean()),
                "ld_energy": float((d * smoothed).norm() / smoothed.mean()),
                "webster": sigma_squared * float(guided.square().mean()),
                "attention_entropy": entropy,
                "cosine": cosine(uncond, d),
                "cosine_low": cosine(uncond_low, d_low),
                "mask": m.numpy(),
                "energy": d.square().sum(0).numpy(),
            }
            row["anisotropy"] = row["magnitude"] + 2 * row["cosine_low"]
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        means: dict[str, Any] = {name: np.mean(values, 0) for name, values in found.items()}
        facts = {"num_tokens": prompt.num_tokens, "truncated": prompt.truncated}
        return {**means, "ld_std": np.std(found["ld"]), **facts}

    def difference(self, caption: str, x: Tensor, steps: int = 50) -> Any:
        """The noise difference of one caption and noise, [C, H, W]."""
        t = self.timesteps(steps)[0]
        outputs = [self.noise(self.output(x, t, self.encode(text)), x, t) for text in (caption, "")]
        return (outputs[0] - outputs[1]).numpy()

    def step(self, x: Tensor, output: Tensor, t: int, steps: int) -> Tensor:
        """DDIM, eta 0: x_{t-1} = sqrt(a') x_0 + sqrt(1 - a') eps; below the last timestep a' is alpha_bar[0]."""
        a, before = self.alpha_bar[t], t - self.train_steps // steps
        a_prev = self.alpha_bar[before] if before >= 0 else self.alpha_bar[0]
        if self.v_prediction:
            x_0 = torch.sqrt(a) * x - torch.sqrt(1 - a) * output
        else:
            x_0 = (x - torch.sqrt(1 - a) * output) / torch.sqrt(a)
        return torch.sqrt(a_prev) * x_0 + torch.sqrt(1 - a_prev) * self.noise(output, x, t)

    def trajectory(self, caption: str, x: Tensor, steps: int) -> dict[str, Any]:
        """Two passes, as the official code makes: the first for the BE mask, the second for LD with it."""
        prompt, empty = self.encode(caption), self.encode("")
        start, masks = x, []
        for t in self.timesteps(steps):
            uncond, conditional = self.output(x, t, empty), self.output(x, t, prompt)
            masks.append(self.mask(prompt))
            x = self.step(x, uncond + self.guidance_scale * (conditional - uncond), t, steps)
        be_mask, x = masks[-1], start
        ld, magnitude, d = [], [], x
        for t in self.timesteps(steps):
            uncond, conditional = self.output(x, t, empty), self.output(x, t, prompt)
            d = self.noise(conditional, x, t) - self.noise(uncond, x, t)
            ld.append(float((d * be_mask).norm() / be_mask.mean()))
            magnitude.append(float(d.norm()))
            x = self.step(x, uncond + self.guidance_scale * (conditional - uncond), t, steps)
        last = self.timesteps(steps)[-1]
        with torch.no_grad():
            decoded = self.pipeline.vae.decode(x[None] / self.pipeline.vae.config.scaling_factor).sample[0]
        return {
            "be_mask": be_mask.numpy(),
            "masks_t": torch.stack(masks).numpy(),
            "ld_t": np.array(ld),
            "magnitude_t": np.array(magnitude),
            "score_map": (d.square().sum(0) / (1 - self.alpha_bar[last])).numpy(),
            "image": (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(),
        }


def smooth(energy: Tensor) -> Tensor:
    """Mean of each cell's 3 x 3 neighbours inside the map."""
    height, width = energy.shape
    rows = [
        [float(energy[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean()) for j in range(width)]
        for i in range(height)
    ]
    return torch.tensor(rows)


def excess(energies: Any, sample: Any) -> list[float]:
    """Of each energy map [N, H, W] the largest standardised log mean, under what is usual of the sample's [M, H, W]."""
    height, width = energies.shape[1:]
    found = [-math.inf] * len(energies)
    for half in (1, 2, 4, max(height, width)):  # windows of 3, 5, 9 and everything
        for i in range(height):
            for j in range(width):
                window = (slice(None), slice(max(i - half, 0), i + half + 1), slice(max(j - half, 0), j + half + 1))
                usual = sorted(math.log(each.mean()) for each in sample[window])
                median, upper = np.quantile(usual, [0.5, 0.84])
                for at, each in enumerate(energies[window]):
                    found[at] = max(found[at], (math.log(each.mean()) - median) / max(upper - median, 1e-3))
    return found


def peak(energies: Any, sample: Any) -> list[float]:
    """Of each energy map [N, H, W] the largest log mean of 3 x 3 cells above the sample's median [M, H, W]."""
    height, width = energies.shape[1:]
    found = [-math.inf] * len(energies)
    for i in range(height):
        for j in range(width):
            window = (slice(None), slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2))
            median = np.median([math.log(each.mean()) for each in sample[window]])
            found = [
                max(best, math.log(each.mean()) - median) for best, each in zip(found, energies[window], strict=True)
            ]
    return found


def less_common(differences: Any, sample: Any) -> Any:
    """Noise differences [N, C, H, W] without the mean and the first 16 principal components (one for every eight) of
    those four fifths of a sample [M, C, H, W] whose energy is least.
    """
    flat = sample.reshape(len(sample), -1).astype(np.float64)
    calm = flat[np.argsort((flat**2).sum(1), kind="stable")[: round(0.8 * len(flat))]]
    mean = calm.mean(0)
    parts = np.linalg.svd(calm - mean, full_matrices=False)[2][: min(16, len(calm) // 8)]
    left = differences.reshape(len(differences), -1) - mean
    return (left - left @ parts.T @ parts).reshape(differences.shape)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine over channels at every pixel, averaged."""
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean())
