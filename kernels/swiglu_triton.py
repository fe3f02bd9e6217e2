"""The feed-forward layer's gate in Triton: one pass over memory each way, silu computed again in the backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.specimen import Specimen

BLOCK = 2048
"""Numbers a program computes: 16 a thread."""


@triton.jit
def _forward_kernel(gate: tl.tensor, up: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _backward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    gradient: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    slope = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(d_up + at, (slope * g * share).to(d_up.dtype.element_ty), mask=at < count)
    steepness = share * (1 + g * (1 - share))
    tl.store(d_gate + at, (slope * u * steepness).to(d_gate.dtype.element_ty), mask=at < count)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` in float32, rounded once. Inputs that are not contiguous are copied first."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, computed in float32, each rounded once."""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _backward_kernel[grid](gate, up, gradient, d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=4)
    return d_gate, d_up


def specimens() -> list[Specimen]:
    """Both kernels in bfloat16 and float32."""
    found = []
    for dtype in ("bf16", "fp32"):
        forward = dict.fromkeys(("gate", "up", "out"), f"*{dtype}") | {"count": "i64"}
        backward = dict.fromkeys(("gate", "up", "gradient", "d_gate", "d_up"), f"*{dtype}") | {"count": "i64"}
        found.append(Specimen(f"swiglu_forward_{dtype}", _forward_kernel, forward, {"BLOCK": BLOCK}))
        found.append(Specimen(f"swiglu_backward_{dtype}", _backward_kernel, backward, {"BLOCK": BLOCK}))
    return found
