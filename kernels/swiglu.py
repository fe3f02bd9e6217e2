"""The gate of the feed-forward layer."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.norm import split_rows


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, in their dtype. Source: Shazeer 2020."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Computes silu again in the backward pass, where autograd would keep it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for g, u, result in zip(*map(split_rows, (gate, up, out)), strict=True):
            torch.ops.aten.silu.out(g, out=result).mul_(u)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
        for g, u, slope, to_gate, to_up in zip(*map(split_rows, (gate, up, gradient, d_gate, d_up)), strict=True):
            torch.ops.aten.silu.out(g, out=to_up).mul_(slope)
            torch.mul(slope, u, out=to_gate)
            torch.ops.aten.silu_backward.grad_input(to_gate, g, grad_input=to_gate)
        return d_gate, d_up
