"""The U-Net, trained on encoded pictures until it memorises those that repeat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recipe.config import Recipe
from tests.recipe.dataset import Pictures, to_float, tokenize
from tests.recipe.drawing import SIZE
from tests.recipe.parts import NOISE, Parts
from tests.recipe.training import PRECISION, bfloat16, log, train

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LATENT = SIZE // 4
EMPTY_SHARE = 0.1  # of a batch
EMA_DECAY = 0.999
SAVE_SECONDS = 120.0


class SpelledOutAttention:
    """Attention as it is written: on CPU its backward is several times faster than the fused one's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        probabilities = torch.bmm(q * attn.scale, k.transpose(1, 2)).softmax(-1)
        out = torch.bmm(probabilities.to(v.dtype), v).unflatten(0, (-1, attn.heads))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Encoded:
    """What the training loop draws from."""

    latents: Tensor  # [N, 4, 16, 16] float16: general, then template, then repeated pictures
    captions: Tensor  # [U, 77, 128] PRECISION, one for each different caption
    caption_of: Tensor  # [N] int64 into `captions`
    empty: Tensor  # [1, 77, 128] PRECISION, the caption ""


@torch.no_grad()
def encode(pictures: Pictures, parts: Parts) -> Encoded:
    """Every picture through the VAE (the mean, scaled), every different caption through the text encoder."""

    def latents(x: Tensor) -> Tensor:
        with bfloat16():
            mean = parts.vae.encode(to_float(x)).latent_dist.mode()
        return (mean.float() * parts.vae.config.scaling_factor).half()

    def hidden(ids: Tensor) -> Tensor:
        with bfloat16():
            return parts.text(ids).last_hidden_state.to(PRECISION)

    kinds = (pictures.general_pictures, pictures.local_pictures, pictures.global_pictures)
    ids = torch.cat([pictures.general_ids, pictures.local_ids, pictures.global_ids])
    different, caption_of = torch.unique(ids, dim=0, return_inverse=True)
    encoded = Encoded(
        latents=torch.cat([latents(x) for kind in kinds for x in kind.split(250)]),
        captions=torch.cat([hidden(x) for x in different.split(500)]),
        caption_of=caption_of,
        empty=parts.text(tokenize(parts.tokenizer, [""])).last_hidden_state.to(PRECISION),
    )
    log(f"encoded {len(encoded.latents)} pictures, {len(encoded.captions)} different captions")
    return encoded


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    """Stable Diffusion 1's U-Net with fewer channels, cross-attention at 16 x 16 and 8 x 8."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        block_out_channels=recipe.channels,
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=2,  # a head count, as in Stable Diffusion 1
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=32,
    )


class Average:
    """The weights' exponential average: what is kept, checkpointed and shipped."""

    def __init__(self, parameters: list[nn.Parameter], checkpoint: Path) -> None:
        self.parameters, self.checkpoint = parameters, checkpoint
        self.done_seconds, self.start, self.saved = 0.0, time.monotonic(), time.monotonic()
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            with torch.no_grad():
                for parameter, value in zip(parameters, state["ema"], strict=True):
                    parameter.copy_(value)
            self.done_seconds = float(state["seconds"])
            log(f"going on from {self.done_seconds:.0f} s")
        self.values = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        """Take the new weights in; write the checkpoint when it is time."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Replace the checkpoint."""
        self.saved = time.monotonic()
        temporary = self.checkpoint.with_suffix(".tmp")
        seconds = self.done_seconds + self.saved - self.start
        torch.save({"ema": [v.half() for v in self.values], "seconds": seconds}, temporary)
        temporary.rename(self.checkpoint)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)


def train_unet(
    pictures: Pictures, parts: Parts, checkpoint: Path, recipe: Recipe, start: UNet2DConditionModel | None = None
) -> UNet2DConditionModel:
    """Epsilon prediction. Goes on from `checkpoint` when there is one: from the average, with a fresh optimizer.

    Args:
        start: trained further where there is no checkpoint; without it a new one is trained.
    """
    from diffusers import DDPMScheduler

    unet = start if start is not None else make_unet(recipe)
    unet.set_attn_processor(SpelledOutAttention())
    parameters = list(unet.parameters())
    log(f"unet: {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters")
    data = encode(pictures, parts)
    average = Average(parameters, checkpoint)

    n_general, n_local = len(pictures.general_pictures), len(pictures.local_pictures)
    weight = torch.as_tensor(pictures.world.global_weight, dtype=torch.float32)
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    batch = recipe.batch
    general, local = int(batch * recipe.general_share), int(batch * recipe.local_share)

    def loss_of_step() -> Tensor:
        drawn = [
            torch.randint(0, n_general, (general,)),
            n_general + torch.randint(0, n_local, (local,)),
            n_general + n_local + torch.multinomial(weight, batch - general - local, replacement=True),
        ]
        index = torch.cat(drawn)
        empty = (torch.rand(batch) < EMPTY_SHARE)[:, None, None]
        condition = torch.where(empty, data.empty, data.captions[data.caption_of[index]])
        x0 = data.latents[index].float()
        t, noise = torch.randint(0, 1000, (batch,)), torch.randn(x0.shape)
        alpha = alphas[t][:, None, None, None]
        with bfloat16():
            noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
            predicted = unet(noisy, t, encoder_hidden_states=condition).sample
        return F.mse_loss(predicted.float(), noise)

    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    train(
        "unet",
        optimizer,
        loss_of_step,
        recipe.unet_seconds,
        steps=recipe.unet_steps,
        done_seconds=average.done_seconds,
        after_step=average.update,
        report_seconds=60.0,
    )
    average.save()
    average.apply()
    return unet.eval().requires_grad_(False)
