"""Rotary position embedding, in the 'rotate half' convention of Llama's published weights."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.select import use_triton


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


def rotate_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns each pair (i, i + head_dim / 2) of queries and keys by its angle, in the tables' dtype.

    Not in place. The projections that q and k come from would allow it: nothing keeps their results for the backward
    pass. But q and k are views of them, and autograd refuses a function that overwrites views and has two results;
    what it would save is freed as soon as this returns. Source: Su et al. 2021; half-split pairs as in Hugging Face's
    Llama.

    Args:
        q: (batch, seq, heads, head_dim), head_dim even.
        k: (batch, seq, any number of heads, head_dim).
        cos, sin: from `tables`, (batch or 1, seq, 1, head_dim / 2). They take no gradient.

    Returns:
        q and k turned, each in its own dtype, contiguous.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    batch, seq, _, head_dim = q.shape
    fits = head_dim % 2 == 0 and k.shape == (batch, seq, k.shape[2], head_dim) and cos.shape == sin.shape
    if not fits or cos.shape not in {(rows, seq, 1, head_dim // 2) for rows in (1, batch)}:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, cos, sin))
        raise ValueError(
            f"q, k, cos, sin have shapes {shapes}; they must be two of (batch, seq, any, head_dim) and two of "
            "(batch or 1, seq, 1, head_dim / 2)"
        )
    if torch.compiler.is_compiling():  # which fuses it with its neighbours
        return _turn(q, cos, sin), _turn(k, cos, sin)
    return _RotateQK.apply(q, k, cos, sin)


class _RotateQK(torch.autograd.Function):
    """The gradient is turned back: by the same angles with their sines negated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn_both(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_turn_both(d_q, d_k, cos, sin, back=True), None, None


def _turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    if use_triton("rope", q, k, cos, sin):
        from armillary.kernels.rope_triton import turn

        return turn(q, k, cos, sin, back)
    sin = -sin if back else sin
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (half.to(cos.dtype) for half in x.chunk(2, dim=-1))
    if torch.compiler.is_compiling():
        # torch 2.13 loses what is written into halves of a tensor; and a compiler fuses this anyway.
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)
