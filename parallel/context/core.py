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
from armillary.kernels.attention.call import Gradients, Partial, attention, check, row_dots
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.parallel.context import all_gather as context_gather
from armillary.parallel.context import ring as context_ring
from armillary.parallel.context import token_ring as context_token_ring
from armillary.parallel.context import ulysses as context_ulysses
from armillary.parallel.context.call import Call, Heads
from armillary.parallel.context.choice import Machine, Shape, choose
from armillary.parallel.context.layout import ShardPlaces


@dataclass(frozen=True)
class Strategy:
    """How one rank's part of a call is computed: see `context/call.py`."""

    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]


RINGS = {
    "ring": Strategy(context_ring.forward, context_ring.backward),
    "bidirectional_ring": Strategy(context_ring.forward_both_ways, context_ring.backward_both_ways),
    "token_ring": Strategy(context_token_ring.forward, context_token_ring.backward),
    "all_gather": Strategy(context_gather.forward, context_gather.backward),
}
"""Strategies for any number of ranks, which `hybrid` may use across levels."""
STRATEGIES = (*RINGS, "ulysses", "hybrid")
"""All, but for `auto`, which is one of them: see `context/choice.py`."""


def strategy_of(name: str, size: int, level: int | None = None, across: str = "ring") -> Strategy:
    """The strategy of a name for a group of `size` ranks.

    Args:
        level: ranks of a fast level, neighbours in the group, for hybrid; None for the smallest divisor of `size`.
        across: hybrid's strategy across levels.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in RINGS:
        return RINGS[name]
    if name not in STRATEGIES or across not in RINGS:
        known = ", ".join(STRATEGIES if name not in STRATEGIES else RINGS)
        wrong = name if name not in STRATEGIES else across
        raise ValueError(f"plan.context: there is no strategy {wrong!r} here; there are {known}")
    degree = size if name == "ulysses" else level or smallest_divisor(size)
    outer = RINGS["all_gather" if name == "ulysses" else across]
    return Strategy(
        partial(context_ulysses.forward, degree=degree, inner=outer.forward),
        partial(context_ulysses.backward, degree=degree, inner=outer.backward),
    )


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
    across: str = "ring",
    machine: Machine | None = None,
    scale: float | None = None,
    first_head: int = 0,
    implementation: str | None = None,
    purpose: str = "context",
) -> Partial:
    """As `kernels.attention.call.attention`, with the keys of all ranks of `group`. Both results are differentiable.

    Args:
        q, k, v: of this rank's tokens, all alike float32, bfloat16, float16 or float64.
        shards: where the tokens of every rank of the group stand.
        mask: which keys of its document a query sees.
        strategy: one of `STRATEGIES` or `auto`, or one for forward and one for backward.
        level, across: see `strategy_of`.
        machine: what `auto` chooses by.
        scale: 1 / sqrt(head_dim) if None.
        first_head: number of the first key head in the whole model, where heads are shared out too.
        purpose: what the ledger counts the bytes for, followed by " forward" or " backward".

    Raises:
        ValueError: if shapes, places and ranks do not fit together, or there is no such strategy.
    """
    if len(shards) != group.size():
        raise ValueError(f"context attention: places of {len(shards)} shards, but the group has {group.size()} ranks")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    own = shards[group.rank()]
    check(q, k, v, Tile(own, own, mask, scale, first_head))
    names: tuple[str, ...] = (strategy, strategy) if isinstance(strategy, str) else strategy
    if "auto" in names:
        chosen = choose_strategies(q, k, shards, mask, machine, level)
        names = tuple(one if name == "auto" else name for name, one in zip(names, chosen, strict=True))
    ways = [strategy_of(name, group.size(), level, across) for name in names]
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
        implementation=implementation,
    )
    passes = call(purpose=f"{purpose} forward"), call(purpose=f"{purpose} backward")
    return Partial(*_ContextAttention.apply(q, k, v, ways[0].forward, ways[1].backward, *passes))


def choose_strategies(
    q: Tensor, k: Tensor, shards: Sequence[Places], mask: Mask, machine: Machine | None, level: int | None = None
) -> tuple[str, str]:
    """What `auto` is for such a call, forward and backward; the same on every rank.

    Raises:
        ValueError: if nothing is known of the machine.
    """
    if machine is None:
        raise ValueError("plan.context: auto needs the rate of the links; measure them, or name a strategy")
    tokens, rows = max(places.seq for places in shards) * q.shape[0], q.shape[0]
    sizes = q.shape[2], k.shape[2], q.shape[3], q.dtype.itemsize
    shape = Shape(len(shards), tokens, *sizes, causal=mask.causal, rows=max(rows, 1))
    forward, backward = (choose(shape, machine, back, mask=mask, level=level) for back in (False, True))
    return forward.strategy, backward.strategy


class _ContextAttention(torch.autograd.Function):
    """Saves its inputs and results, and computes nothing twice. Gradients that nobody asked for count as zeros: a
    rank must take part whenever the others do."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, there: Callable, back: Callable, call: Call, back_call: Call
    ) -> Partial:
        result = there(q, k, v, call)
        ctx.save_for_backward(q, k, v, *result)
        ctx.back = partial(back, call=back_call)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = row_dots(out, d_out, lse, d_lse)
        gradients = ctx.back(d_out.to(q.dtype).contiguous(), q, k, v, lse, delta)
        return (*(gradient.to(q.dtype) for gradient in gradients), None, None, None, None)


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
        across: str = "ring",
        machine: Machine | None = None,
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
            across=across,
            machine=machine,
            first_head=first_head,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        if not isinstance(places, ShardPlaces):  # all ranks have all tokens, as when a model writes text
            return attention(q, k, v, places, mask=self.mask).out
        return self.attend(q, k, v, places.shards).out
