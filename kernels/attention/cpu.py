"""Attention on the CPU by torch's blocked kernel, which gives the log-sum-exp and takes it back for the gradients.

A call is cut (`attention/cpu_plan.py`) so that torch's kernel sees only what it knows. What it gets wrong for our
purpose is mended here: a query that sees nothing gets log-sum-exp 0 from it, not -inf.

Its backward takes `out`, and from it only delta, the sum over head_dim of `out * d_out`. Ours is given delta, which may
hold the gradient of the log-sum-exp and belong to keys that are elsewhere. So it is handed an `out` that has this
delta, within a rounding: delta over the first channel of d_out in that channel, 0 in the others. Where the first
channel is 0 and delta is not, all heads get one more channel instead: 0 in queries and keys, 1 in values, -delta in
d_out, so that its products subtract delta; that takes an eighth longer. Blocked matrix products of our own, which
would take delta as it is, were measured too: 5 to 20 % slower than torch's kernel at 256 to 2,048 tokens.

All but float64 is computed in float32. On a machine with bfloat16 units (AVX512-BF16), torch's kernel takes as long in
bfloat16 for the forward pass, and 0.55 times as long for the backward; without them 1.2 to 2.5 times as long. float32
is the one that is never slow, and rounds partial results once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.attention.cpu_plan import Part, Piece, plan, seen
from armillary.kernels.attention.merge import merge_
from armillary.kernels.attention.tiles import Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
NEVER = 1e30
"""A log-sum-exp so large that exp(score - it) is 0: for queries that see nothing."""


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, out: Tensor, lse: Tensor, fold: bool) -> None:
    """See `choice.IMPLEMENTATIONS`."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (tensor.to(lse.dtype).transpose(1, 2) for tensor in (q, k, v))
    for piece in plan(tile, k.shape[1]):
        heads = slice(piece.heads.start * group, piece.heads.stop * group)
        new = _forward_of_piece(
            q[piece.rows, heads], k[piece.rows, piece.heads], v[piece.rows, piece.heads], tile, piece
        )
        into = out[piece.rows, piece.queries, heads], lse[piece.rows, heads, piece.queries]
        if fold:
            merge_(into, new)
        else:
            into[0].copy_(new[0])
            into[1].copy_(new[1])


def _forward_of_piece(q: Tensor, k: Tensor, v: Tensor, tile: Tile, piece: Piece) -> tuple[Tensor, Tensor]:
    """`out` (rows, queries, heads, head_dim) and `lse` (rows, heads, queries) of the piece's queries."""
    result = None
    for part in piece.parts:
        bias, blind = _bias(tile, piece, part, q.dtype)
        inputs = q[:, :, part.queries], k[:, :, part.keys], v[:, :, part.keys]
        new = _forward(*inputs, 0.0, part.kind == "causal", attn_mask=bias, scale=tile.scale)
        if blind is not None:
            new[0].masked_fill_(blind[..., None], 0)
            new[1].masked_fill_(blind, -math.inf)
        new = new[0].transpose(1, 2), new[1]
        if result is None and part.queries == piece.queries:
            result = new
            continue
        result = result or _nothing(q, piece)
        stretch = slice(part.queries.start - piece.queries.start, part.queries.stop - piece.queries.start)
        merge_((result[0][:, stretch], result[1][:, :, stretch]), new)
    return result or _nothing(q, piece)


def _nothing(q: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    rows, heads, _, head_dim = q.shape
    num_queries = piece.queries.stop - piece.queries.start
    out = q.new_zeros(rows, num_queries, heads, head_dim)
    return out, q.new_full((rows, heads, num_queries), -math.inf)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile: Tile,
    gradients: tuple[Tensor, Tensor, Tensor],
    add: tuple[bool, ...],
) -> None:
    """See `choice.IMPLEMENTATIONS`."""
    wide, head_dim, group = lse.dtype, q.shape[3], q.shape[2] // k.shape[2]
    d_out, q, k, v = (tensor.to(wide).transpose(1, 2) for tensor in (d_out, q, k, v))
    lse = lse.masked_fill(lse == -math.inf, NEVER)
    out = _with_delta(d_out, delta)
    if out is None:
        q, k, v = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(v, (0, 1), value=1)
        d_out = torch.cat([d_out, -delta[..., None]], -1)
        out = torch.zeros_like(d_out)

    def of_part(piece: Piece, part: Part) -> list[Tensor]:
        ours = piece.rows, slice(piece.heads.start * group, piece.heads.stop * group), part.queries
        theirs = [tensor[piece.rows, piece.heads][:, :, part.keys] for tensor in (k, v)]
        bias, _ = _bias(tile, piece, part, wide)
        rest = out[ours], lse[ours], 0.0, part.kind == "causal"
        new = _backward(d_out[ours], q[ours], *theirs, *rest, attn_mask=bias, scale=tile.scale)
        return [gradient[..., :head_dim].transpose(1, 2) for gradient in new]

    pieces = plan(tile, k.shape[1])
    if _in_one_call(pieces, q, k) and not any(add):
        for buffer, new in zip(gradients, of_part(pieces[0], pieces[0].parts[0]), strict=True):
            buffer.copy_(new)
        return
    sums = [_sum(buffer, added, wide) for buffer, added in zip(gradients, add, strict=True)]
    for piece in pieces:
        heads = slice(piece.heads.start * group, piece.heads.stop * group)
        for part in piece.parts:
            d_q, *d_kv = of_part(piece, part)
            sums[0][piece.rows, part.queries, heads] += d_q
            for total, new in zip(sums[1:], d_kv, strict=True):
                view = total[piece.rows, :, piece.heads]
                if isinstance(part.keys, slice):
                    view[:, part.keys] += new
                else:
                    view.index_add_(1, part.keys, new.to(view.dtype))
    for buffer, total in zip(gradients, sums, strict=True):
        if buffer is not total:
            buffer.copy_(total)


def _in_one_call(pieces: list[Piece], q: Tensor, k: Tensor) -> bool:
    """Whether one part is all, so that its gradients need no summing up."""
    if len(pieces) != 1 or len(pieces[0].parts) != 1:
        return False
    piece, part = pieces[0], pieces[0].parts[0]
    stretches = (piece.rows, piece.heads, part.queries, part.keys)
    return stretches == tuple(slice(0, size) for size in (k.shape[0], k.shape[1], q.shape[2], k.shape[2]))


def _sum(buffer: Tensor, added: bool, wide: torch.dtype) -> Tensor:
    """Where a gradient is summed up: in its buffer, unless that is narrow."""
    if added:
        return buffer
    return buffer.zero_() if buffer.dtype == wide else torch.zeros(buffer.shape, dtype=wide)


def _bias(tile: Tile, piece: Piece, part: Part, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores of a masked part (rows or 1, 1, queries, keys); which of its queries see nothing."""
    if part.kind != "masked":
        return None, None
    shown = seen(tile, piece, part)[:, None]
    blind = ~shown.any(-1)
    return torch.zeros(shown.shape, dtype=dtype).masked_fill_(~shown, -math.inf), blind if bool(blind.any()) else None


def _with_delta(d_out: Tensor, delta: Tensor) -> Tensor | None:
    """An `out` (batch, heads, queries, head_dim) whose products with `d_out` sum to `delta`; None if a row has none."""
    ratio = torch.where(delta == 0, 0, delta / d_out[..., 0])
    if not bool(ratio.isfinite().all()):
        return None
    out = torch.zeros_like(d_out)
    out[..., 0] = ratio
    return out
