"""RMSNorm in Llama's order of casts, alone and joined with the sum that precedes it in a residual stream."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.select import use_triton

CPU_ROWS = 256
"""Rows computed at a time on the CPU, so that what lies between two steps stays in the cache."""
TRITON_DIM = 16384
"""The longest row that a Triton program holds in its registers; plain torch computes longer ones."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim; x (..., dim), weight (dim,).

    Computes in float32 (float64 for float64 input), casts to x's dtype, then multiplies by the weight, as Llama does.
    Returns x's shape and dtype. Source: Zhang and Sennrich 2019.

    Raises:
        ValueError: if weight is not (dim,).
    """
    if torch.compiler.is_compiling():
        return _in_plain_torch(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)` in one pass over memory; x and residual (..., dim), weight (dim,).

    The order of casts is that of the two operations apart: the sum is rounded to the dtype of x and residual, and
    that rounded sum is what `rms_norm` reads. The gradients of both results meet in float32 and are rounded once.

    Raises:
        ValueError: if x and residual differ in shape or dtype, or weight is not (dim,).
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} must be alike"
        )
    if torch.compiler.is_compiling():
        total = x + residual
        return _in_plain_torch(total, weight, eps), total
    return _RMSNorm.apply(x, residual, weight, eps)


def _in_plain_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """For a compiler, which fuses it with its neighbours and decides itself what to keep for backward."""
    rows = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (rows * (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


class _RMSNorm(torch.autograd.Function):
    """Keeps what it normalised and one number a row, where autograd would keep three tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight {tuple(weight.shape)} does not fit rows of {tuple(x.shape)}")
        ctx.set_materialize_grads(False)
        forward = _forward
        if _with_triton(x, weight):
            from armillary.kernels.norm_triton import forward
        out, total, inverse = forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        return out if residual is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        if d_out is None:
            return d_total, d_total, None, None
        backward = _backward
        if _with_triton(total, weight):
            from armillary.kernels.norm_triton import backward
        d_x, d_weight = backward(total, weight, inverse, d_out, d_total)
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_weight, None


def _with_triton(x: Tensor, weight: Tensor) -> bool:
    return x.shape[-1] <= TRITON_DIM and use_triton("norm", x, weight)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, what was normalised (x itself without a residual), and its 1 / root mean square (...)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    inverse = torch.empty(x.shape[:-1], dtype=wide, device=x.device)
    parts = [split_rows(t) for t in (x, total, out, inverse[..., None])]
    added = [None] * len(parts[0]) if residual is None else split_rows(residual)
    for rows, summed, result, scale, more in zip(*parts, added, strict=True):
        if more is not None:
            rows = torch.add(rows, more, out=summed)
        rows = rows.to(wide)
        torch.mean(rows.square(), dim=-1, keepdim=True, out=scale)
        scale.add_(eps).rsqrt_()
        torch.mul((rows * scale).to(x.dtype), weight, out=result)
    return out, total, inverse


def _backward(
    x: Tensor, weight: Tensor, inverse: Tensor, d_out: Tensor, d_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised, d_total included, and of the weight."""
    wide_weight = weight.to(inverse.dtype)
    d_weight, d_x = torch.zeros_like(wide_weight), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = [split_rows(t) for t in (x, d_out, inverse[..., None], d_x)]
    added = [None] * len(parts[0]) if d_total is None else split_rows(d_total)
    # With r = scale and g = slope: d_x = r w g - x r^3 (x . w g) / dim, and d_w is the sum of r x g over rows.
    for rows, slope, scale, result, more in zip(*parts, added, strict=True):
        rows = rows.to(inverse.dtype)
        product = slope * rows
        d_weight.addmv_(product.t(), scale[:, 0])
        pull = torch.mv(product, wide_weight)[:, None] * scale.pow(3) / -x.shape[-1]
        torch.mul(slope, scale, out=product).mul_(wide_weight)
        if more is None:
            torch.addcmul(product, rows, pull, out=result)
        else:
            torch.add(product.addcmul_(rows, pull), more, out=result)
    return d_x, d_weight.to(weight.dtype)


def split_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """The rows of a tensor (..., dim) in pieces: one on a GPU, on the CPU as many as make each fit the cache.

    Views where the tensor is contiguous, so that results may be written into them.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    # Without `split` where there is nothing to split: it takes as long as the norm of a row.
    whole = rows.device.type != "cpu" or len(rows) <= CPU_ROWS
    return (rows,) if whole else rows.split(CPU_ROWS)
