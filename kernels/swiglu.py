"""The gate of the feed-forward layer."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.norm import split_rows
from armillary.kernels.select import use_triton


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, in their dtype and shape. Source: Shazeer 2020.

    Raises:
        ValueError: if the two differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike")
    if torch.compiler.is_compiling():  # which fuses it with its neighbours
        return torch.nn.functional.silu(gate) * up
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Computes silu again in the backward pass, where autograd would keep it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if use_triton("swiglu", gate, up):
            from armillary.kernels.swiglu_triton import forward

            return forward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if use_triton("swiglu", gate, up):
            from armillary.kernels.swiglu_triton import backward

            return backward(gate, up, gradient)
        return _backward(gate, up, gradient)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for g, u, result in zip(*map(split_rows, (gate, up, out)), strict=True):
        torch.ops.aten.silu.out(g, out=result).mul_(u)
    return out


def _backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    for g, u, slope, to_gate, to_up in zip(*map(split_rows, (gate, up, gradient, d_gate, d_up)), strict=True):
        torch.ops.aten.silu.out(g, out=to_up).mul_(slope)
        torch.mul(slope, u, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, g, grad_input=to_gate)
    return d_gate, d_up
