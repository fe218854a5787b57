"""The training loop that CLIP, the VAE and the U-Net share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 100
_START = time.monotonic()


def log(message: str) -> None:
    """One line, with the seconds since the process started."""
    print(f"[{time.monotonic() - _START:7.1f} s] {message}", flush=True)


_KNOWN = torch.cpu.get_capabilities()
KNOWS_BFLOAT16 = bool(_KNOWN.get("avx512_bf16") or _KNOWN.get("amx_bf16"))
"""Whether the processor has bfloat16: it is twice as fast as float32 then, and twenty times slower where it has not."""
PRECISION = torch.bfloat16 if KNOWS_BFLOAT16 else torch.float32


def bfloat16() -> torch.autocast:
    """CPU autocast where the processor knows bfloat16."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=KNOWS_BFLOAT16)


def train(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss_of_step: Callable[[], Tensor],
    seconds: float,
    *,
    steps: int | None = None,
    done_seconds: float = 0.0,
    after_step: Callable[[int], None] = lambda step: None,
    report_seconds: float = 30.0,
) -> None:
    """Step until the time is spent, with the learning rate warmed up by steps and decayed (cosine, to 2 %) by time.

    Args:
        seconds: budget of this call; one step is always made.
        steps: so many instead, and the decay by them: then a machine's speed does not tell what is learnt.
        done_seconds: what earlier calls spent: the decay goes on from there.
        after_step: called with the step's number.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]
    start, step, reported, smooth = time.monotonic(), 0, 0.0, 0.0
    while step < steps if steps else step == 0 or time.monotonic() - start < seconds:
        by_time = (done_seconds + time.monotonic() - start) / (done_seconds + seconds)
        progress = step / steps if steps else min(1.0, by_time)
        decay = max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, step / WARM_UP_STEPS + 0.01) * decay
        loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step(step)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        if time.monotonic() - reported > report_seconds:
            reported = time.monotonic()
            log(f"{name}: step {step}, loss {smooth:.4f}")
    log(f"{name}: {step} steps, loss {smooth:.4f}")
