"""RMSNorm in Triton: one pass over memory each way, several short rows or one long row a program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.specimen import Specimen

PROGRAMS = 512
"""Programs of the backward pass, each with its own partial sum of the weight's gradient. A constant, not a count of
processors, so that the order of summation, and with it every bit, is the same on any GPU."""
BACKWARD_WIDTH = 8192
"""Longer rows are divided among programs in the backward pass: registers hold no more numbers and partial sums."""


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    inverse: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    real = (rows < num_rows)[:, None] & (columns < DIM)
    at = rows[:, None] * DIM + columns
    value = tl.load(x + rows[:, None] * x_stride + columns, mask=real, other=0.0)
    dtype = value.dtype
    value = value.to(tl.float32)
    if ADD:
        value += tl.load(residual + rows[:, None] * residual_stride + columns, mask=real, other=0.0).to(tl.float32)
        # Rounded as the stream is: the norm reads what the next block will read.
        rounded = value.to(dtype)
        tl.store(total + at, rounded, mask=real)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)
    tl.store(inverse + rows, scale, mask=rows < num_rows)
    slope = tl.load(weight + columns, mask=columns < DIM, other=0.0).to(tl.float32)
    normal = (value * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(out + at, (normal * slope).to(dtype), mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    d_out: tl.tensor,
    d_total: tl.tensor,
    d_x: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    d_out_stride: tl.tensor,
    d_total_stride: tl.tensor,
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Program (p, c) takes every num_programs-th group of rows, and of those rows the c-th WIDTH of columns."""
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    slope = tl.load(weight + columns, mask=columns < DIM, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = (rows < num_rows)[:, None] & (columns < DIM)[None, :]
        scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
        from_x, from_out = x + rows * x_stride, d_out + rows * d_out_stride
        normal = tl.load(from_x[:, None] + columns[None, :], mask=real, other=0.0).to(tl.float32) * scale[:, None]
        pull = tl.load(from_out[:, None] + columns[None, :], mask=real, other=0.0).to(tl.float32)
        if WIDTH >= DIM:
            share = tl.sum(pull * slope * normal, axis=1) / DIM
        else:
            share = _wide_product(from_x, from_out, weight, rows < num_rows, DIM, ROWS, WIDTH) * scale / DIM
        d_weight += pull * normal
        gradient = (pull * slope - normal * share[:, None]) * scale[:, None]
        if ADD:
            at = rows[:, None] * d_total_stride + columns[None, :]
            gradient += tl.load(d_total + at, mask=real, other=0.0).to(tl.float32)
        tl.store(d_x + rows[:, None] * DIM + columns[None, :], gradient.to(d_x.dtype.element_ty), mask=real)
    at = tl.program_id(0).to(tl.int64) * DIM + columns
    tl.store(partial + at, tl.sum(d_weight, axis=0), mask=columns < DIM)


@triton.jit
def _wide_product(
    from_x: tl.tensor,
    from_out: tl.tensor,
    weight: tl.tensor,
    real: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Sum of x * d_out * weight over whole rows, of which the calling program holds a part only."""
    products = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, DIM, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = real[:, None] & (columns < DIM)[None, :]
        slope = tl.load(weight + columns, mask=columns < DIM, other=0.0).to(tl.float32)
        value = tl.load(from_x[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        pull = tl.load(from_out[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        products += pull * slope[None, :] * value
    return tl.sum(products, axis=1)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, what was normalised (x itself without a residual), and its 1 / root mean square (...) in float32.

    Rows may lie at any distance from each other; other layouts are copied first.
    """
    rows, added = _rows(x), _rows(x if residual is None else residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    shape = _forward_shape(x.shape[-1])
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(rows.shape[0], shape["ROWS"]),)](
            rows,
            added,
            weight.contiguous(),
            out,
            total,
            inverse,
            rows.shape[0],
            rows.stride(0),
            added.stride(0),
            eps,
            ADD=residual is not None,
            DIM=x.shape[-1],
            **shape,
        )
    return out, total, inverse


def backward(
    x: Tensor, weight: Tensor, inverse: Tensor, d_out: Tensor, d_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised, d_total included, and of the weight."""
    rows, pull = _rows(x), _rows(d_out)
    added = pull if d_total is None else _rows(d_total)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = _backward_shape(x.shape[-1])
    programs = min(PROGRAMS, triton.cdiv(rows.shape[0], shape["ROWS"]))
    partial = torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs, triton.cdiv(x.shape[-1], shape["WIDTH"]))](
            rows,
            weight.contiguous(),
            inverse,
            pull,
            added,
            d_x,
            partial,
            rows.shape[0],
            rows.stride(0),
            pull.stride(0),
            added.stride(0),
            ADD=d_total is not None,
            DIM=x.shape[-1],
            **shape,
        )
    return d_x, partial.sum(dim=0).to(weight.dtype)


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward_shape(dim: int) -> dict[str, int]:
    return _shape(dim, 16)


def _backward_shape(dim: int) -> dict[str, int]:
    # Half as many: it also holds the sums of the weight's gradient, and with 16 the compiler spills for some GPUs.
    return _shape(min(dim, BACKWARD_WIDTH), 8)


def _shape(dim: int, share: int) -> dict[str, int]:
    """Tile and warps for rows of `dim`: one long row or several short ones, `share` numbers a thread or a few more."""
    width = max(16, triton.next_power_of_2(dim))
    return {
        "ROWS": max(1, 128 * share // width),
        "WIDTH": width,
        "num_warps": min(16, max(4, width // (32 * share))),
    }


def specimens() -> list[Specimen]:
    """Every tile in bfloat16, with whole and with ragged rows, and some, among them the fullest, in float32."""
    found = []
    for dim in (16, 32, 64, 80, 128, 256, 512, 1024, 2048, 4096, 5120, 8192, 16384):
        found += _pair(dim, "bf16")
    return found + [pair for dim in (128, 1024, 4096, 8192, 16384) for pair in _pair(dim, "fp32")]


def _pair(dim: int, dtype: str) -> list[Specimen]:
    forward = dict.fromkeys(("x", "residual", "weight", "out", "total"), f"*{dtype}") | {"inverse": "*fp32"}
    forward |= dict.fromkeys(("num_rows", "x_stride", "residual_stride"), "i32") | {"eps": "fp32"}
    backward = dict.fromkeys(("x", "weight", "d_out", "d_total", "d_x"), f"*{dtype}")
    backward |= dict.fromkeys(("inverse", "partial"), "*fp32")
    backward |= dict.fromkeys(("num_rows", "x_stride", "d_out_stride", "d_total_stride"), "i32")
    return [
        _specimen(f"norm_forward_{dim}_{dtype}", _forward_kernel, forward, dim, _forward_shape(dim)),
        _specimen(f"norm_backward_{dim}_{dtype}", _backward_kernel, backward, dim, _backward_shape(dim)),
    ]


def _specimen(name: str, kernel: Any, signature: dict[str, str], dim: int, shape: dict[str, int]) -> Specimen:
    constants = {"ADD": True, "DIM": dim, "ROWS": shape["ROWS"], "WIDTH": shape["WIDTH"]}
    return Specimen(name, kernel, signature, constants, shape["num_warps"], unaligned=frozenset({"num_rows"}))
