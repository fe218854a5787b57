"""Which devices a command works on."""

from __future__ import annotations


def find_devices(device: str, workers: int) -> list[str]:
    """One device a worker: every CUDA device for `auto` and `cuda`, else the device named, `workers` times.

    A single entry means: in this process.
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        return [f"cuda:{number % count}" for number in range(workers or count)]
    return [device] * max(workers, 1)
