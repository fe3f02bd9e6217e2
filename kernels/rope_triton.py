"""Rotary positions in Triton: queries and keys in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.specimen import Specimen

PAIRS = 2048
"""Pairs that a program turns, of as many heads as that takes."""


@triton.jit(do_not_specialize=["batch", "seq"])
def _kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tokens: tl.tensor,
    seq: tl.tensor,
    q_batch: tl.tensor,
    q_seq: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    table_row: tl.tensor,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """The first programs turn the heads of all queries, ROWS at a time, the others those of the keys."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(tokens * Q_HEADS, ROWS)
    if tile < q_tiles:
        _turn(
            q, q_out, cos, sin, tile, tokens, seq, q_batch, q_seq, q_head, table_row, Q_HEADS, HALF, ROWS, WIDTH, BACK
        )
    else:
        tile -= q_tiles
        _turn(
            k, k_out, cos, sin, tile, tokens, seq, k_batch, k_seq, k_head, table_row, K_HEADS, HALF, ROWS, WIDTH, BACK
        )


@triton.jit
def _turn(
    x: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tile: tl.tensor,
    tokens: tl.tensor,
    seq: tl.tensor,
    batch_stride: tl.tensor,
    seq_stride: tl.tensor,
    head_stride: tl.tensor,
    table_row: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    rows = tile * ROWS + tl.arange(0, ROWS)
    token, head = rows // HEADS, (rows % HEADS).to(tl.int64)
    row, place = (token // seq).to(tl.int64), (token % seq).to(tl.int64)
    pairs = tl.arange(0, WIDTH)[None, :]
    real = (token < tokens)[:, None] & (pairs < HALF)
    table = (row * table_row + place * HALF)[:, None] + pairs
    c = tl.load(cos + table, mask=real, other=0.0)
    s = tl.load(sin + table, mask=real, other=0.0)
    if BACK:
        s = -s
    at = (row * batch_stride + place * seq_stride + head * head_stride)[:, None] + pairs
    first = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=real, other=0.0).to(tl.float32)
    to = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs
    tl.store(out + to, (first * c - second * s).to(out.dtype.element_ty), mask=real)
    tl.store(out + to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=real)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """See `rotate_qk`; `back` turns the other way. The tables are read in float32.

    Any layout is read where it lies as long as a head's numbers lie side by side; others are copied first.
    """
    q, k = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k))
    q_out, k_out = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k))
    cos, sin = (table.float().contiguous() for table in (cos, sin))
    batch, seq, half = q.shape[0], q.shape[1], q.shape[3] // 2
    shape = _shape(half)
    programs = sum(triton.cdiv(tensor[..., 0].numel(), shape["ROWS"]) for tensor in (q, k))
    with torch.cuda.device_of(q):
        _kernel[(programs,)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            batch * seq,
            seq,
            *q.stride()[:3],
            *k.stride()[:3],
            0 if cos.shape[0] == 1 else cos.stride(0),
            Q_HEADS=q.shape[2],
            K_HEADS=k.shape[2],
            HALF=half,
            BACK=back,
            num_warps=4,
            **shape,
        )
    return q_out, k_out


def _shape(half: int) -> dict[str, int]:
    width = triton.next_power_of_2(half)
    return {"ROWS": max(1, PAIRS // width), "WIDTH": width}


def specimens() -> list[Specimen]:
    """Every width in bfloat16, also with idle lanes, and the commonest in float32."""
    return [_specimen(head_dim, "bf16") for head_dim in (32, 64, 80, 96, 128, 192, 256)] + [_specimen(128, "fp32")]


def _specimen(head_dim: int, dtype: str) -> Specimen:
    signature = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}") | dict.fromkeys(("cos", "sin"), "*fp32")
    strides = ("q_batch", "q_seq", "q_head", "k_batch", "k_seq", "k_head", "table_row")
    signature |= dict.fromkeys(("tokens", "seq", *strides), "i32")
    constants = {"Q_HEADS": 32, "K_HEADS": 8, "HALF": head_dim // 2, "BACK": True, **_shape(head_dim // 2)}
    loose = frozenset({"tokens", "seq"})
    return Specimen(f"rope_{head_dim}_{dtype}", _kernel, signature, constants, unaligned=loose)
