"""RMSNorm in Llama's order of casts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim; x (..., dim), weight (dim,).

    Computes in float32 (float64 for float64 input), casts to x's dtype, then multiplies by the weight, as Llama does.
    Source: Zhang and Sennrich 2019.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row for the backward pass, where autograd would keep three tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dim = x.shape[-1]
        wide, scale = x.to(inverse.dtype), weight.to(inverse.dtype)
        # With r = inverse and g = gradient: d_x = r w g - x r^3 (x . w g) / dim, and d_w = sum of r x g over rows.
        product = (gradient * wide).view(-1, dim)
        d_weight = torch.mv(product.t(), inverse.view(-1))
        pull = torch.mv(product, scale).view_as(inverse) * inverse.pow(3) / -dim
        d_x = (gradient * inverse).mul_(scale).addcmul_(wide, pull)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
