"""Joins two partial attention results over different keys into the result over all of them.

A partial result is a pair (out, lse): out (batch, seq, heads, head_dim), the weighted mean of the values; lse (batch,
heads, seq), the natural logarithm of the sum of exp(score), float32, or float64 with float64. Where a query saw no key,
lse is -inf and out counts as 0, whatever stands there. Joined:

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

The second weight is sigmoid(lse_b - lse_a), which no gap overflows, and the first is 1 less it. Source: Milakov and
Gimelshein 2018 (online softmax); Liu et al. 2023 (Ring Attention).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.select import use_triton

Pair = tuple[Tensor, Tensor]
"""A partial result, for example `call.Partial`."""
PIECE = 1 << 16
"""Numbers taken at a time on the CPU where dtypes differ, so that what is cast stays in the cache."""
TRITON_DIM = 1024
"""The longest head_dim that a Triton program holds in its registers; plain torch computes longer ones."""


def merge(a: Pair, b: Pair, dtype: torch.dtype | None = None) -> Pair:
    """The result over the keys of both, new, `out` in `dtype` (the wider of both if None); differentiable in all four.

    Arithmetic is float32, or float64 where an input is. Neither values nor gradients are NaN where a side is empty.

    Raises:
        ValueError: if shapes do not fit, or an lse is not float32 or float64.
    """
    _check(a, b)
    return _Merge.apply(*a, *b, dtype)


@torch.no_grad()
def merge_(into: Pair, other: Pair) -> None:
    """`into` becomes the result over the keys of both, in place; not differentiable.

    `into` may be a view, such as a stretch of a longer sequence. A sum of many parts wants `into` in float32.

    Raises:
        ValueError: if shapes do not fit, or an lse is not float32 or float64.
    """
    _check(into, other)
    _forward(*into, *other, *into)


class _Merge(torch.autograd.Function):
    """Keeps no tensor but its inputs, and the two `out` only for the gradients of the two `lse`."""

    @staticmethod
    def forward(ctx: Any, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, dtype: torch.dtype | None) -> Any:
        ctx.set_materialize_grads(False)
        out = out_a.new_empty(out_a.shape, dtype=dtype or torch.promote_types(out_a.dtype, out_b.dtype))
        lse = lse_a.new_empty(lse_a.shape, dtype=torch.promote_types(lse_a.dtype, lse_b.dtype))
        _forward(out_a, lse_a, out_b, lse_b, out, lse)
        outs = (out_a, out_b) if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(lse_a, lse_b, *outs)
        ctx.dtypes = (out_a.dtype, out_b.dtype)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        lse_a, lse_b, out_a, out_b = ctx.saved_tensors
        if d_out is None:
            first, second = _weights(lse_a, lse_b)
            d_lses = (None, None) if d_lse is None else _lse_gradients(first, second, None, d_lse)
            return None, _as(d_lses[0], lse_a), None, _as(d_lses[1], lse_b), None
        backward = _backward
        if _with_triton(d_out, lse_a, lse_b, *(t for t in (out_a, out_b, d_lse) if t is not None)):
            from armillary.kernels.attention.merge_triton import backward
        d_out_a, d_lse_a, d_out_b, d_lse_b = backward(d_out, d_lse, lse_a, lse_b, out_a, out_b, ctx.dtypes)
        return d_out_a, _as(d_lse_a, lse_a), d_out_b, _as(d_lse_b, lse_b), None


def _check(a: Pair, b: Pair) -> None:
    (out_a, lse_a), (out_b, lse_b) = a, b
    fit = out_a.dim() == 4 and lse_a.shape == (out_a.shape[0], out_a.shape[2], out_a.shape[1])
    if not fit or out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ValueError(
            f"merge: out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and "
            f"{tuple(lse_b.shape)} do not fit; allowed are out (batch, seq, heads, head_dim), lse (batch, heads, seq)"
        )
    if any(lse.dtype not in (torch.float32, torch.float64) for lse in (lse_a, lse_b)):
        raise ValueError(f"merge: lse {lse_a.dtype} and {lse_b.dtype} must be float32 or float64: it holds exponents")


def _with_triton(out: Tensor, *others: Tensor) -> bool:
    return out.shape[-1] <= TRITON_DIM and use_triton("merge", out, *others)


def _forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fills `out` and `lse`, which may be the tensors of side a."""
    if _with_triton(out_a, lse_a, out_b, lse_b, out, lse):
        from armillary.kernels.attention.merge_triton import forward

        return forward(out_a, lse_a, out_b, lse_b, out, lse)
    gap = lse_b - lse_a
    share = torch.sigmoid(gap)
    if _may_be_empty(gap):
        # 0 times a NaN is a NaN: where a side is empty, 0 must stand.
        nothing = lse_b == -math.inf
        share.masked_fill_(nothing, 0)
        out_b = out_b.masked_fill(_of_rows(nothing), 0)
        out_a = (out_a.masked_fill_ if out_a is out else out_a.masked_fill)(_of_rows(lse_a == -math.inf), 0)
    torch.logaddexp(lse_a, lse_b, out=lse)
    if out_a.dtype == out_b.dtype == out.dtype == share.dtype:
        torch.lerp(out_a, out_b, _of_rows(share), out=out)
        return None
    wide = torch.promote_types(share.dtype, torch.promote_types(out_a.dtype, out_b.dtype))
    for first, second, weight, result in _pieces(out_a, out_b, _of_rows(share), out):
        mixed = torch.lerp(first.to(wide), second.to(wide), weight.to(wide), **_into(result, wide))
        if mixed is not result:
            result.copy_(mixed)
    return None


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    lse_a: Tensor,
    lse_b: Tensor,
    out_a: Tensor | None,
    out_b: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of out_a, lse_a, out_b and lse_b; None for the two lse where `out_a` and `out_b` are.

    With weights u and w: d_out_a = u d_out, d_out_b = w d_out, d_lse_a = u d_lse + u w d_out . (out_a - out_b), and
    d_lse_b alike with the other sign.
    """
    shares = _weights(lse_a, lse_b)
    wide = shares[0].dtype
    d_sides = [torch.empty(d_out.shape, dtype=dtype, device=d_out.device) for dtype in dtypes]
    pull = None
    if out_a is not None and out_b is not None:
        pull = torch.empty(d_out.shape[:3], dtype=wide, device=d_out.device)[..., None]
    others = [d_out] * 3 if pull is None else [out_a, out_b, pull]
    for slope, u, w, d_a, d_b, one, two, moved in _pieces(d_out, *map(_of_rows, shares), *d_sides, *others):
        slope = slope.to(wide)
        for share, d_side in ((u, d_a), (w, d_b)):
            product = torch.mul(slope, share, **_into(d_side, wide))
            if product is not d_side:
                d_side.copy_(product)
        if pull is not None:
            torch.sum((one.to(wide) - two).mul_(slope), -1, keepdim=True, out=moved)
    if _may_be_empty(lse_b - lse_a):
        for lse, d_side in zip((lse_a, lse_b), d_sides, strict=True):
            nothing = _of_rows(lse == -math.inf)
            d_side.masked_fill_(nothing, 0)
            if pull is not None:
                pull.masked_fill_(nothing, 0)
    if pull is None:
        return d_sides[0], None, d_sides[1], None
    d_lse_a, d_lse_b = _lse_gradients(*shares, pull[..., 0].transpose(1, 2), d_lse)
    return d_sides[0], d_lse_a, d_sides[1], d_lse_b


def _lse_gradients(first: Tensor, second: Tensor, pull: Tensor | None, d_lse: Tensor | None) -> Pair:
    """Of both sides, from the weights, `d_out . (out_a - out_b)` and `d_lse`, all (batch, heads, seq)."""
    moved = torch.zeros_like(first) if pull is None else first * second * pull
    if d_lse is None:
        return moved, -moved
    # Where nothing was seen, the gradient may be anything.
    d_lse = d_lse.masked_fill((first == 0) & (second == 0), 0)
    return torch.addcmul(moved, first, d_lse), torch.addcmul(-moved, second, d_lse)


def _weights(lse_a: Tensor, lse_b: Tensor) -> Pair:
    """What each side counts, (batch, heads, seq); 0 where it is empty."""
    gap = lse_b - lse_a
    first, second = torch.sigmoid(-gap), torch.sigmoid(gap)
    if _may_be_empty(gap):
        first.masked_fill_(lse_a == -math.inf, 0)
        second.masked_fill_(lse_b == -math.inf, 0)
    return first, second


def _may_be_empty(gap: Tensor) -> bool:
    """Whether some row of a side may have seen no key, given lse_b - lse_a; False where looking shows that none is.

    On a GPU looking would wait for it.
    """
    if gap.device.type != "cpu" or gap.numel() == 0:
        return True
    return not all(math.isfinite(end) for end in torch.aminmax(gap))


def _of_rows(values: Tensor) -> Tensor:
    """(batch, heads, seq) as it broadcasts against `out`."""
    return values.transpose(1, 2).unsqueeze(-1)


def _into(result: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The argument that lets an operation of `dtype` write its result where it belongs, without another tensor."""
    return {"out": result} if result.dtype == dtype else {}


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors (batch, seq, heads, any) cut along seq alike, so that what the first has fits the CPU's cache."""
    batch, seq, heads, dim = tensors[0].shape
    size = max(1, PIECE // max(1, batch * heads * dim))
    if tensors[0].device.type != "cpu" or size >= seq:
        return [tensors]
    return zip(*(tensor.split(size, 1) for tensor in tensors), strict=True)


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
