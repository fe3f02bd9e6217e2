"""RMSNorm in Llama's order of casts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ROWS = 256
"""Rows computed at a time on the CPU, so that what lies between two steps stays in the cache."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim; x (..., dim), weight (dim,).

    Computes in float32 (float64 for float64 input), casts to x's dtype, then multiplies by the weight, as Llama does.
    Source: Zhang and Sennrich 2019.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row for the backward pass, where autograd would keep three tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(x.shape[:-1], dtype=wide, device=x.device)
        for rows, result, scale in zip(*map(split_rows, (x, out, inverse[..., None])), strict=True):
            rows = rows.to(wide)
            torch.mean(rows.square(), dim=-1, keepdim=True, out=scale)
            scale.add_(eps).rsqrt_()
            torch.mul((rows * scale).to(x.dtype), weight, out=result)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide_weight = weight.to(inverse.dtype)
        d_weight, d_x = torch.zeros_like(wide_weight), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # With r = scale and g = slope: d_x = r w g - x r^3 (x . w g) / dim, and d_w is the sum of r x g over rows.
        for rows, slope, scale, result in zip(*map(split_rows, (x, gradient, inverse[..., None], d_x)), strict=True):
            rows = rows.to(inverse.dtype)
            product = slope * rows
            d_weight.addmv_(product.t(), scale[:, 0])
            pull = torch.mv(product, wide_weight)[:, None] * scale.pow(3) / -x.shape[-1]
            result.copy_(torch.mul(slope, scale, out=product).mul_(wide_weight).addcmul_(rows, pull))
        return d_x, d_weight.to(weight.dtype), None


def split_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """The rows of a tensor (..., dim) in pieces: one on a GPU, on the CPU as many as make each fit the cache.

    Views where the tensor is contiguous, so that results may be written into them.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.split(CPU_ROWS if tensor.device.type == "cpu" else max(1, rows.shape[0]))
