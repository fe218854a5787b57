"""Linear layers of a denoiser in eight bits: half the memory of their weights, and products that recent GPUs do faster.

Weights and inputs are float8 (e4m3, three bits of mantissa) with one scale a row, as in Micikevicius et al. 2022, "FP8
Formats for Deep Learning", and torchao's row-wise dynamic float8. Products are summed in float32 by the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ModelError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-12  # of a row of nothing but zeros
MULTIPLE = 16  # of both sides of a weight, which the kernels ask for


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 and their scales: `values` is about their product.

    Args:
        values: finite, [N, D], of any float dtype.

    Returns:
        [N, D] float8 e4m3, and [N, 1] float32.
    """
    scale = (values.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (values.float() / scale).to(FLOAT8), scale


class _Product(torch.autograd.Function):
    """x W^T; its gradient is that of the same weights, and takes the inputs' rounding for none."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        context.save_for_backward(weight, scale)
        values, of_row = quantize(rows)
        return torch._scaled_mm(values, weight.t(), scale_a=of_row, scale_b=scale.t(), out_dtype=torch.bfloat16)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = context.saved_tensors
        return gradients[0] @ (weight.float() * scale).to(gradients[0].dtype), None, None


class Float8Linear(nn.Module):
    """A linear layer whose weight is kept, and whose product is computed, in float8. [..., D] to [..., O], bfloat16.

    Args:
        linear: in bfloat16, both sides of its weight multiples of 16.
    """

    weight8: Tensor
    scale: Tensor
    plain = False
    """Whether the same rounded numbers are multiplied in float32 instead."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("weight8", weight)
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if self.plain:
            values, of_row = quantize(rows)
            found = ((values.float() * of_row) @ (self.weight8.float() * self.scale).t()).bfloat16()
        else:
            found = _Product.apply(rows, self.weight8, self.scale)
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*inputs.shape[:-1], self.out_features)


def check_device(device: torch.device) -> None:
    """Raise ModelError where a device, or torch on it, does not compute in float8: one product is tried."""
    try:
        Float8Linear(nn.Linear(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16).requires_grad_(False))(
            torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16)
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(f"float8: {device} does not compute in it ({why}); give float16", "dtype") from error


def to_float8(denoiser: nn.Module) -> int:
    """Exchange the linear layers of attention and feed-forward of a denoiser in bfloat16; how many it was.

    What sees the timestep and the pooled prompt (modulations, embeddings) stays, as do a network's first and last
    layer: they are a small part of the work, and every position depends on them.

    Raises:
        ModelError: there is none.
    """
    linear = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    exchanged = [(name, layer) for name, layer in linear if _exchanged(name, layer)]
    if not exchanged:
        raise ModelError("float8: its denoiser has no layer that can be computed in it; give float16", "dtype")
    for name, layer in exchanged:
        parent, _, last = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), last, Float8Linear(layer))
    return len(exchanged)


@contextmanager
def plain_products(denoiser: nn.Module) -> Iterator[None]:
    """Inside the block float8 layers multiply without the device's float8: what a device is compared with."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, Float8Linear)]
    for layer in layers:
        layer.plain = True
    try:
        yield
    finally:
        for layer in layers:
            layer.plain = False


def _exchanged(name: str, layer: nn.Linear) -> bool:
    """Whether a layer lies in a block of attention and is no modulation."""
    path = name.split(".")
    inside = any(part == "attentions" or part.endswith("transformer_blocks") for part in path)
    fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    return inside and fits and not any(part.startswith("norm") for part in path)
