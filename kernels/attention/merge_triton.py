"""The joining of two partial attention results in Triton: one pass over memory each way, in place or not.

A program takes ROWS tokens of one head: rows of `out` that lie a token apart, and neighbours in `lse`. Neighbouring
programs take the heads of the same tokens, whose rows lie side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.specimen import Specimen

NUMBERS = 2048
"""Numbers of `out` a program takes: 16 a thread, of three or five tensors at once."""


@triton.jit
def _rows(num_heads: tl.tensor, seq: tl.tensor, ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Batch and head of this program, its tokens (ROWS,); int64, since tensors may hold more than 2^31 numbers."""
    program = tl.program_id(0)
    pieces = (seq + ROWS - 1) // ROWS
    head = program % num_heads
    piece = program // num_heads
    tokens = (piece % pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (piece // pieces).to(tl.int64), head.to(tl.int64), tokens


@triton.jit
def _shares(lse_a: tl.tensor, lse_b: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What each side counts, and the joint lse. All 0, 0 and -inf where both are empty."""
    # Not tl.maximum: of a number and a NaN, all of it must become NaN.
    top = tl.where(lse_a > lse_b, lse_a, lse_b)
    nothing = top == -float("inf")
    base = tl.where(nothing, 0.0, top)
    first, second = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = tl.where(nothing, 1.0, first + second)
    lse = tl.where(nothing, -float("inf"), base + tl.log(total))
    return first / total, second / total, lse


@triton.jit(do_not_specialize=["num_heads", "seq"])
def _forward_kernel(
    out_a: tl.tensor,
    lse_a: tl.tensor,
    out_b: tl.tensor,
    lse_b: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_heads: tl.tensor,
    seq: tl.tensor,
    out_a_batch: tl.tensor,
    out_a_seq: tl.tensor,
    out_a_head: tl.tensor,
    lse_a_batch: tl.tensor,
    lse_a_head: tl.tensor,
    lse_a_seq: tl.tensor,
    out_b_batch: tl.tensor,
    out_b_seq: tl.tensor,
    out_b_head: tl.tensor,
    lse_b_batch: tl.tensor,
    lse_b_head: tl.tensor,
    lse_b_seq: tl.tensor,
    out_batch: tl.tensor,
    out_seq: tl.tensor,
    out_head: tl.tensor,
    lse_batch: tl.tensor,
    lse_head: tl.tensor,
    lse_seq: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    batch, head, tokens = _rows(num_heads, seq, ROWS)
    here = tokens < seq
    columns = tl.arange(0, WIDTH)[None, :]
    real = here[:, None] & (columns < DIM)
    one = tl.load(lse_a + batch * lse_a_batch + head * lse_a_head + tokens * lse_a_seq, mask=here, other=0.0)
    two = tl.load(lse_b + batch * lse_b_batch + head * lse_b_head + tokens * lse_b_seq, mask=here, other=0.0)
    at_a = out_a + batch * out_a_batch + head * out_a_head + tokens[:, None] * out_a_seq + columns
    at_b = out_b + batch * out_b_batch + head * out_b_head + tokens[:, None] * out_b_seq + columns
    # Where a side is empty its rows are not even read.
    a = tl.load(at_a, mask=real & (one != -float("inf"))[:, None], other=0.0).to(tl.float32)
    b = tl.load(at_b, mask=real & (two != -float("inf"))[:, None], other=0.0).to(tl.float32)
    first, second, joint = _shares(one, two)
    mixed = a * first[:, None] + b * second[:, None]
    at = out + batch * out_batch + head * out_head + tokens[:, None] * out_seq + columns
    tl.store(at, mixed.to(out.dtype.element_ty), mask=real)
    tl.store(lse + batch * lse_batch + head * lse_head + tokens * lse_seq, joint, mask=here)


@triton.jit(do_not_specialize=["num_heads", "seq"])
def _backward_kernel(
    d_out: tl.tensor,
    d_lse: tl.tensor,
    lse_a: tl.tensor,
    lse_b: tl.tensor,
    out_a: tl.tensor,
    out_b: tl.tensor,
    d_out_a: tl.tensor,
    d_lse_a: tl.tensor,
    d_out_b: tl.tensor,
    d_lse_b: tl.tensor,
    num_heads: tl.tensor,
    seq: tl.tensor,
    d_out_batch: tl.tensor,
    d_out_seq: tl.tensor,
    d_out_head: tl.tensor,
    out_a_batch: tl.tensor,
    out_a_seq: tl.tensor,
    out_a_head: tl.tensor,
    out_b_batch: tl.tensor,
    out_b_seq: tl.tensor,
    out_b_head: tl.tensor,
    PULL: tl.constexpr,
    LSE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    batch, head, tokens = _rows(num_heads, seq, ROWS)
    here = tokens < seq
    columns = tl.arange(0, WIDTH)[None, :]
    real = here[:, None] & (columns < DIM)
    row = (batch * num_heads + head) * seq + tokens
    one = tl.load(lse_a + row, mask=here, other=0.0)
    two = tl.load(lse_b + row, mask=here, other=0.0)
    some_a, some_b = one != -float("inf"), two != -float("inf")
    # Where nothing was seen, the gradient that comes may be anything.
    some = some_a | some_b
    first, second, _ = _shares(one, two)
    at = d_out + batch * d_out_batch + head * d_out_head + tokens[:, None] * d_out_seq + columns
    slope = tl.load(at, mask=real & some[:, None], other=0.0).to(tl.float32)
    to = ((batch * seq + tokens) * num_heads + head)[:, None] * DIM + columns
    tl.store(d_out_a + to, (slope * first[:, None]).to(d_out_a.dtype.element_ty), mask=real)
    tl.store(d_out_b + to, (slope * second[:, None]).to(d_out_b.dtype.element_ty), mask=real)
    if PULL:
        at_a = out_a + batch * out_a_batch + head * out_a_head + tokens[:, None] * out_a_seq + columns
        at_b = out_b + batch * out_b_batch + head * out_b_head + tokens[:, None] * out_b_seq + columns
        both = real & (some_a & some_b)[:, None]
        a = tl.load(at_a, mask=both, other=0.0).to(tl.float32)
        b = tl.load(at_b, mask=both, other=0.0).to(tl.float32)
        moved = first * second * tl.sum((a - b) * slope, axis=1)
        d_first, d_second = moved, -moved
        if LSE:
            pull = tl.load(d_lse + row, mask=here & some, other=0.0)
            d_first += first * pull
            d_second += second * pull
        tl.store(d_lse_a + row, d_first, mask=here)
        tl.store(d_lse_b + row, d_second, mask=here)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fills `out` and `lse`, which may be the tensors of side a; any strides.

    Moves `out_a`, `out_b` and `out` once each, and three numbers a row.
    """
    if out.numel() == 0:
        return
    if out.stride(3) != 1:
        # A result whose last dim is scattered is rare: by way of a tensor in order.
        rows = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        forward(out_a, lse_a, out_b, lse_b, rows, lse)
        out.copy_(rows)
        return
    outs = (_rowwise(out_a), _rowwise(out_b), out)
    strides = [
        number
        for one, two in zip(outs, (lse_a, lse_b, lse), strict=True)
        for number in (*one.stride()[:3], *two.stride())
    ]
    with torch.cuda.device_of(out):
        _forward_kernel[_grid(out)](
            outs[0], lse_a, outs[1], lse_b, out, lse, out.shape[2], out.shape[1], *strides, **_shape(out.shape[3])
        )


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    lse_a: Tensor,
    lse_b: Tensor,
    out_a: Tensor | None,
    out_b: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of out_a, lse_a, out_b and lse_b, in order; None for the two lse where `out_a` and `out_b` are."""
    batch, seq, heads, head_dim = d_out.shape
    d_out_a, d_out_b = (torch.empty(d_out.shape, dtype=dtype, device=d_out.device) for dtype in dtypes)
    with_lse = out_a is not None and out_b is not None
    d_lse_a, d_lse_b = (
        torch.empty((batch, heads, seq), dtype=torch.float32, device=d_out.device) if with_lse else None
        for _ in range(2)
    )
    if d_out.numel() == 0:
        return d_out_a, d_lse_a, d_out_b, d_lse_b
    d_out = _rowwise(d_out)
    # Tensors that are not read stand in for those that are not there.
    outs = [d_out if out is None else _rowwise(out) for out in (out_a, out_b)]
    lses = [lse.contiguous() for lse in (lse_a, lse_b, lse_a if d_lse is None else d_lse)]
    strides = [number for tensor in (d_out, *outs) for number in tensor.stride()[:3]]
    to = [lses[0] if lse is None else lse for lse in (d_lse_a, d_lse_b)]
    with torch.cuda.device_of(d_out):
        _backward_kernel[_grid(d_out)](
            *(d_out, lses[2], *lses[:2], *outs, d_out_a, to[0], d_out_b, to[1], heads, seq, *strides),
            PULL=with_lse,
            LSE=d_lse is not None,
            **_shape(head_dim),
        )
    return d_out_a, d_lse_a, d_out_b, d_lse_b


def _rowwise(out: Tensor) -> Tensor:
    return out if out.stride(3) == 1 else out.contiguous()


def _shape(head_dim: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(head_dim))
    return {"DIM": head_dim, "WIDTH": width, "ROWS": max(1, NUMBERS // width)}


def _grid(out: Tensor) -> tuple[int]:
    batch, seq, heads, head_dim = out.shape
    return (batch * heads * triton.cdiv(seq, _shape(head_dim)["ROWS"]),)


def specimens() -> list[Specimen]:
    """Both kernels: a bfloat16 or float32 part joined to a float32 result, with gradients of all four."""
    return [
        specimen
        for head_dim, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32"), (80, "fp32"))
        for specimen in _pair(head_dim, dtype)
    ]


def _pair(head_dim: int, dtype: str) -> list[Specimen]:
    names = ("lse_a", "lse_b", "out_a", "out_b")
    types = dict.fromkeys(names, "*fp32") | {"out_b": f"*{dtype}"}
    lengths = {"num_heads": "i32", "seq": "i32"}
    dims = ("batch", "seq", "head")
    forward_strides = [f"{name}_{of}" for name in ("out_a", "lse_a", "out_b", "lse_b", "out", "lse") for of in dims]
    forward = {**types, "out": "*fp32", "lse": "*fp32", **lengths, **dict.fromkeys(forward_strides, "i32")}
    backward_strides = [f"{name}_{of}" for name in ("d_out", "out_a", "out_b") for of in dims]
    gradients = {f"d_{name}": types[name] for name in names} | {"d_out": "*fp32", "d_lse": "*fp32"}
    backward = types | gradients | lengths | dict.fromkeys(backward_strides, "i32")
    # The stride of neighbours in lse is 1, and its length need not be a multiple of 16.
    ragged = frozenset(lengths)
    loose = ragged | {stride for stride in forward_strides if stride.startswith("lse")}
    shape = _shape(head_dim)
    flags = {"PULL": True, "LSE": True}
    name = f"{head_dim}_{dtype}"
    return [
        Specimen(f"merge_forward_{name}", _forward_kernel, forward, shape, unaligned=loose),
        Specimen(f"merge_backward_{name}", _backward_kernel, backward, {**flags, **shape}, unaligned=ragged),
    ]
