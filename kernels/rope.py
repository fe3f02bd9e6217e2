"""Rotary position embedding, in the 'rotate half' convention of Llama's published weights."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def frequencies(
    head_dim: int, theta: float, scaling: tuple[float, float, float, int] | None = None, device: Any = None
) -> Tensor:
    """Radians per position of each rotated pair: (head_dim / 2,), float64.

    `scaling` is Llama 3's stretch (factor, low_frequency_factor, high_frequency_factor, original_length): pairs that
    turn fewer than `low` times within the original length turn `factor` times slower, those that turn more than
    `high` times are kept, and those between are blended. Source: Llama 3.1 release.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    base = theta**-steps
    if scaling is None:
        return base
    factor, low, high, original_length = scaling
    turns = base * (original_length / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (kept + (1 - kept) / factor)


def tables(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` (batch, seq): two of (batch, seq, 1, head_dim / 2).

    Angles are taken in float64, where position 100,000 still has ten digits; the tables are `dtype`.
    """
    angles = (positions.to(frequency.dtype)[..., None] * frequency)[:, :, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + head_dim / 2) of x (batch, seq, heads, head_dim) by its angle, in the tables' dtype.

    Returns x's dtype. The tables take no gradient. Source: Su et al. 2021; half-split pairs as in Hugging Face's Llama.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (half.to(cos.dtype) for half in x.chunk(2, dim=-1))
    out = torch.empty_like(x, dtype=cos.dtype)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)
