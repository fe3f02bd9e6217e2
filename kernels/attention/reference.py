"""Attention written out in float64 over all pairs of tokens: the truth that every other path is tested against.

Shapes are those of `kernels/attention/call.py`. It holds all scores, so it is for tests and for what no kernel serves.
"""

import math

import torch
from torch import Tensor

from armillary.kernels.attention.mask import visible
from armillary.kernels.attention.tiles import Tile


def seen(tile: Tile, heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """Whether a query sees a key: bool (batch, heads, queries, keys)."""
    queries, keys = (places.positions(device) for places in (tile.queries, tile.keys))
    same = tile.queries.documents(device)[:, None, :, None] == tile.keys.documents(device)[:, None, None, :]
    head = tile.first_head + torch.arange(kv_heads, device=device).repeat_interleave(heads // kv_heads)
    shown = same & visible(tile.mask, queries[:, None, :, None], keys[:, None, None, :], head[:, None, None])
    return shown.expand(-1, heads, -1, -1)


def reference(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """`out` (batch, queries, heads, head_dim) and `lse` (batch, heads, queries) in float64, differentiable by autograd.

    A query that sees no key has out 0, lse -inf and gradient 0.
    """
    scores, shown, v = _scores(q, k, v, tile)
    scores = scores.masked_fill(~shown, -math.inf)
    blind = ~shown.any(-1)
    # Nothing depends on what is subtracted before exp; it only keeps exp within range.
    top = scores.detach().amax(-1).masked_fill(blind, 0) if k.shape[1] else torch.zeros_like(blind, dtype=scores.dtype)
    weights = (scores - top[..., None]).exp()
    total = weights.sum(-1).masked_fill(blind, 1)
    out = torch.einsum("bhij,bjhd->bihd", weights / total[..., None], v)
    return out, (top + total.log()).masked_fill(blind, -math.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, out: Tensor, lse: Tensor, fold: bool) -> None:
    """See `choice.IMPLEMENTATIONS`."""
    new_out, new_lse = reference(q, k, v, tile)
    if fold:
        both = torch.stack([lse.double(), new_lse])
        joint = torch.logsumexp(both, 0)
        weights = torch.where(both == -math.inf, 0, (both - joint).exp()).transpose(2, 3)[..., None]
        parts = torch.where(weights == 0, 0, torch.stack([out.double(), new_out]))
        new_out, new_lse = (weights * parts).sum(0), joint
    out.copy_(new_out)
    lse.copy_(new_lse)


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
    scores, shown, wide_v = _scores(q, k, v, tile)
    d_out, wide_q, wide_k = d_out.double(), q.double(), _each_head(k, q)
    weights = torch.where(shown & (lse != -math.inf)[..., None], (scores - lse.double()[..., None]).exp(), 0)
    d_weights = torch.einsum("bihd,bjhd->bhij", d_out, wide_v)
    d_scores = tile.scale * weights * (d_weights - delta.double()[..., None])
    d_q = torch.einsum("bhij,bjhd->bihd", d_scores, wide_k)
    d_k = torch.einsum("bhij,bihd->bjhd", d_scores, wide_q)
    d_v = torch.einsum("bhij,bihd->bjhd", weights, d_out)
    # The query heads of one key head add up.
    d_k, d_v = (part.unflatten(2, (k.shape[2], -1)).sum(3) for part in (d_k, d_v))
    for buffer, new, added in zip(gradients, (d_q, d_k, d_v), add, strict=True):
        buffer.copy_(buffer.double() + new if added else new)


def _scores(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores of all pairs, which of them are seen, and the values of each query head."""
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), _each_head(k, q)) * tile.scale
    return scores, seen(tile, q.shape[2], k.shape[2], q.device), _each_head(v, q)


def _each_head(kv: Tensor, q: Tensor) -> Tensor:
    return kv.double().repeat_interleave(q.shape[2] // kv.shape[2], dim=2)
