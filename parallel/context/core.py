"""Attention over keys that are spread over the ranks of a group: the seam that takes the place of a model's own.

Shapes are those of `kernels/attention/call.py`, with the tokens of this rank's shard. How ranks exchange is a
strategy's matter (`STRATEGIES`), and forward and backward may each have their own: all save q, k, v, out and lse,
nothing else. Every rank of the group calls with the same mask and strategies, also one that holds no tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.comm.ledger import Ledger
from armillary.kernels.attention.call import Partial, attention, check, row_dots
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.parallel.context import all_gather, ring, token_ring, ulysses
from armillary.parallel.context.call import Call, Heads, Sums
from armillary.parallel.context.layout import ShardPlaces


@dataclass(frozen=True)
class Strategy:
    """How one rank's part of a call is computed: see `context/call.py`."""

    forward: Callable[..., Partial]
    backward: Callable[..., Sums]


FLAT = {
    "ring": Strategy(ring.forward, ring.backward),
    "bidirectional_ring": Strategy(ring.forward_both_ways, ring.backward_both_ways),
    "token_ring": Strategy(token_ring.forward, token_ring.backward),
    "all_gather": Strategy(all_gather.forward, all_gather.backward),
}
"""Strategies to which all ranks are alike."""
STRATEGIES = (*FLAT, "ulysses", "hybrid")
"""All. A plan's `auto` becomes one of them before a model is built: see `context/choice.py`."""


def strategy_of(name: str, size: int, level: int | None = None) -> Strategy:
    """The strategy of a name for a group of `size` ranks.

    Args:
        level: ranks of a fast level, neighbours in the group, for hybrid; None for the smallest divisor of `size`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in FLAT:
        return FLAT[name]
    if name not in STRATEGIES:
        raise ValueError(f"plan.context: there is no strategy {name!r} here; there are {', '.join(STRATEGIES)}")
    degree = size if name == "ulysses" else level or smallest_divisor(size)
    return Strategy(partial(ulysses.forward, degree=degree), partial(ulysses.backward, degree=degree))


def smallest_divisor(size: int) -> int:
    """Greater than 1, but for 1."""
    return next((d for d in range(2, size + 1) if size % d == 0), 1)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: Sequence[Places],
    mask: Mask,
    strategy: str | tuple[str, str],
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
    level: int | None = None,
    first_head: int = 0,
) -> Partial:
    """As `kernels.attention.call.attention`, with the keys of all ranks of `group`. Both results are differentiable.

    Args:
        q, k, v: of this rank's tokens, all alike float32, bfloat16, float16 or float64.
        shards: where the tokens of every rank of the group stand.
        mask: which keys of its document a query sees.
        strategy: one of `STRATEGIES`, or one for forward and one for backward.
        ledger: bytes are counted for "context forward" and "context backward".
        level: see `strategy_of`.
        first_head: number of the first key head in the whole model, where heads are shared out too.

    Raises:
        ValueError: if shapes, places and ranks do not fit together, or there is no such strategy.
    """
    if len(shards) != group.size():
        raise ValueError(f"context attention: places of {len(shards)} shards, but the group has {group.size()} ranks")
    scale = 1 / math.sqrt(q.shape[-1])
    own = shards[group.rank()]
    check(q, k, v, Tile(own, own, mask, scale, first_head))
    there, back = (strategy, strategy) if isinstance(strategy, str) else strategy
    call = partial(
        Call,
        tuple(shards),
        group.rank(),
        tuple(range(group.size())),
        Heads(0, q.shape[2], q.shape[2] // k.shape[2]),
        mask,
        scale,
        group,
        ledger,
        first_head=first_head,
    )
    return Partial(
        *_ContextAttention.apply(
            q,
            k,
            v,
            partial(strategy_of(there, group.size(), level).forward, call=call(purpose="context forward")),
            partial(strategy_of(back, group.size(), level).backward, call=call(purpose="context backward")),
        )
    )


class _ContextAttention(torch.autograd.Function):
    """Saves its inputs and results, and computes nothing twice. Gradients that nobody asked for count as zeros: a
    rank must take part whenever the others do."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, there: Callable[..., Partial], back: Callable[..., Sums]
    ) -> Partial:
        result = there(q, k, v)
        ctx.save_for_backward(q, k, v, *result)
        ctx.back = back
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = row_dots(out, d_out, lse, d_lse)
        gradients = ctx.back(d_out.to(q.dtype).contiguous(), q, k, v, lse, delta)
        return (*(gradient.to(q.dtype) for gradient in gradients), None, None)


class ContextCore(nn.Module):
    """Takes the place of `train.model.transformer.Core`: called with q, k, v and this rank's `ShardPlaces`. No
    parameters.

    Other `Places` are those of tokens that every rank has whole; then nothing is exchanged."""

    def __init__(
        self,
        strategy: str | tuple[str, str],
        *,
        group: dist.ProcessGroup,
        ledger: Ledger,
        mask: Mask | None = None,
        level: int | None = None,
        first_head: int = 0,
    ) -> None:
        super().__init__()
        self.mask = Mask() if mask is None else mask
        self.attend = partial(
            context_attention,
            mask=self.mask,
            strategy=strategy,
            group=group,
            ledger=ledger,
            level=level,
            first_head=first_head,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        if not isinstance(places, ShardPlaces):  # all ranks have all tokens, as when a model writes text
            return attention(q, k, v, places, mask=self.mask).out
        return self.attend(q, k, v, places.shards).out
