"""Softmax attention over any tile: one call, three implementations behind it that agree.

Shapes: q (batch, queries, heads, head_dim); k, v (batch, keys, kv_heads, head_dim), where kv_heads divides heads and
each key head serves `heads / kv_heads` query heads in a row; lse and delta (batch, heads, queries).

`attention` is for a model: differentiable, and all keys are here. `forward`, `backward` and `row_dots` are its parts,
for a ring: `forward` folds one tile after another into a float32 partial result, and `backward` takes the log-sum-exp
and delta of the whole row, so that the gradients of the tiles simply add up. Source: Dao 2023 (FlashAttention-2).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.attention.choice import implementation_of
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile

CAUSAL = Mask()


class Partial(NamedTuple):
    """The result over some of the keys; `kernels/attention/merge.py` joins two."""

    out: Tensor
    """Weighted mean of the values (batch, queries, heads, head_dim); 0 where a query saw no key."""
    lse: Tensor
    """Natural logarithm of the sum of exp(score), float32 (float64 for float64 input); -inf where it saw none."""


class Gradients(NamedTuple):
    """Of q, k and v; also the buffers to add them to, of which each may be None."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places | None = None,
    keys: Places | None = None,
    *,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    first_head: int = 0,
    implementation: str | None = None,
) -> Partial:
    """`softmax(scale q k^T) v` over the keys that the mask shows, and its log-sum-exp. Both are differentiable.

    Args:
        q, k, v: float32, bfloat16 or float16 (float64 on the CPU), all alike; copied if their last stride is not 1.
        places: where the queries stand; None for one document a row, in order.
        keys: where the keys stand; None for where the queries do.
        mask: which keys of its document a query sees.
        scale: 1 / sqrt(head_dim) if None.
        first_head: number of the first key head in the whole model, where the heads are shared out among ranks.
        implementation: overrides the choice of `attention/choice.py`.

    Raises:
        ValueError: if shapes, dtypes or places do not fit together.
    """
    places = Places.in_order(q.shape[0], q.shape[1]) if places is None else places
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    tile = Tile(places, places if keys is None else keys, mask, scale, first_head)
    check(q, k, v, tile)
    return Partial(*_Attention.apply(q, k, v, tile, implementation))


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    into: Partial | None = None,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Partial:
    """One tile's result, not differentiable: new, with `out` in `dtype` (q's if None), or folded into `into`.

    `into.out` is float32 or wider; it and `into.lse` then hold the result over their keys and this tile's together.
    """
    if into is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q), device=q.device)
    else:
        out, lse = into
    if q.numel() > 0:
        q, k, v = map(_in_rows, (q, k, v))
        implementation_of(q, implementation).forward(q, k, v, tile, out, lse, into is not None)
    return Partial(out, lse)


@torch.no_grad()
def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile: Tile,
    into: Gradients | None = None,
    implementation: str | None = None,
) -> Gradients:
    """Gradients of one tile, given the log-sum-exp and delta (`row_dots`) of its rows over ALL their keys.

    Each gradient is added to its buffer in `into`, float32 or wider, or new in its input's dtype where there is none.
    The order of sums is fixed: the same call gives the same bits.
    """
    into = into or Gradients()
    inputs = (q, k, v)
    d_q, d_k, d_v = (_buffer(t) if given is None else given for t, given in zip(inputs, into, strict=True))
    add = tuple(given is not None for given in into)
    if q.numel() > 0 and k.numel() > 0:
        d_out, q, k, v = map(_in_rows, (d_out, q, k, v))
        chosen = implementation_of(q, implementation)
        chosen.backward(d_out, q, k, v, lse, delta, tile, (d_q, d_k, d_v), add)
    else:
        for buffer, kept in zip((d_q, d_k, d_v), add, strict=True):
            if not kept:
                buffer.zero_()
    return Gradients(d_q, d_k, d_v)


def row_dots(out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None = None) -> Tensor:
    """delta of `backward`: the sum over head_dim of `out * d_out`, less `d_lse`; float32 (batch, heads, queries).

    With that term the log-sum-exp has its gradient for free: d score = p (dP - delta) + p d_lse. Where a query saw no
    key it is 0, whatever stands in the gradients.
    """
    wide = lse.dtype
    if out.dtype == torch.float64 or not out.is_cuda:
        delta = torch.linalg.vecdot(out.to(wide), d_out.to(wide)).transpose(1, 2)
    else:
        delta = (out.to(wide) * d_out).sum(-1).transpose(1, 2)
    if d_lse is not None:
        delta = delta - d_lse
    return delta.masked_fill(lse == -math.inf, 0).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tile: Tile, implementation: str | None) -> Partial:
        result = forward(q, k, v, tile, implementation=implementation)
        ctx.save_for_backward(q, k, v, *result)
        ctx.tile, ctx.implementation = tile, implementation
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 5
        d_out = torch.zeros_like(out) if d_out is None else d_out
        delta = row_dots(out, d_out, lse, d_lse)
        return (*backward(d_out, q, k, v, lse, delta, ctx.tile, implementation=ctx.implementation), None, None)


def check(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> None:
    """Raises ValueError, with what is allowed, if the tensors and places do not fit together."""
    if k.shape != v.shape or q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; allowed are q (batch, "
            "queries, heads, head_dim) and k, v (batch, keys, kv_heads, head_dim)"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} heads are not a multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype} must be one floating-point dtype")
    if not 0 < tile.scale < math.inf:
        raise ValueError(f"attention: scale {tile.scale} must be a positive number")
    for name, tensor, places in (("queries", q, tile.queries), ("keys", k, tile.keys)):
        if tensor.shape[:2] != (places.batch, places.seq):
            raise ValueError(
                f"attention: {tuple(tensor.shape[:2])} (batch, {name}), but places for ({places.batch}, {places.seq})"
            )


def _in_rows(tensor: Tensor) -> Tensor:
    """With the channels of a head next to each other; the gradient of a sum, for one, is a single number, expanded."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
