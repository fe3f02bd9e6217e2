"""TokenRing: queries go out and partial results come home, keys and values never move.

In step s rank r computes for the queries that came straight from rank r + s; meanwhile those of later steps go out to
the ranks before, and the results of the step before go straight home. Nothing is relayed. Backward is alike:
Q, dO, lse and delta go out, dQ comes home, and dK and dV add up where the keys are, in float32.

Sources: Wang et al. 2024 (TokenRing) for the forward pass, whose queries are relayed from rank to rank; the backward
pass, and sending direct, are ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from armillary.comm.exchange import Exchange, Receive, Send
from armillary.kernels.attention.call import Partial
from armillary.kernels.attention.merge import merge_
from armillary.kernels.attention.places import Places
from armillary.parallel.context.call import (
    Call,
    Sums,
    add,
    own_backward,
    pick,
    put,
    tile_backward,
    tile_forward,
    wide,
)

Parts = list[tuple[Tensor, int]]
"""Tensors of all of a rank's tokens, each with the dim that counts them."""
AHEAD = 2
"""Steps whose queries are under way at once. They come from different ranks: where each pair has a link of its own, two
arrive in the time of one."""


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial:
    result: Partial | None = None

    def compute(parts: list[Tensor], places: Places) -> list[Tensor]:
        return list(tile_forward(parts[0], k, v, call, places, call.own, call.heads))

    def own(last: bool) -> None:
        nonlocal result
        if not last:
            result = tile_forward(q, k, v, call, call.own, call.own, call.heads, dtype=wide(q.dtype))

    def absorb(tokens: np.ndarray, parts: list[Tensor]) -> None:
        assert result is not None
        _fold(result, tokens, Partial(*parts))

    home = [(q, 1), (torch.empty(q.shape[0], q.shape[2], 0, dtype=wide(q.dtype), device=q.device), 2)]
    _circulate(call, [(q, 1)], home, own, compute, absorb)
    assert result is not None
    return Partial(result.out.to(q.dtype), result.lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call) -> Sums:
    total = Sums.empty(q, k, v)

    def compute(parts: list[Tensor], places: Places) -> list[Tensor]:
        their_q, their_d_out, their_lse, their_delta = parts
        d_q = torch.zeros(their_q.shape, dtype=wide(q.dtype), device=q.device)
        inputs = their_d_out, their_q, k, v, their_lse, their_delta
        tile_backward(inputs, call, places, call.own, call.heads, total._replace(q=d_q))
        return [d_q.to(q.dtype)]

    def own(last: bool) -> None:
        own_backward((d_out, q, k, v, lse, delta), call, total, last=last)

    def absorb(tokens: np.ndarray, parts: list[Tensor]) -> None:
        add(total.q, 1, np.ones_like(tokens), tokens, parts[0])

    _circulate(call, [(q, 1), (d_out, 1), (lse, 2), (delta, 2)], [(q, 1)], own, compute, absorb)
    return total


def _circulate(
    call: Call,
    outgoing: Parts,
    home: Parts,
    own: Callable[[bool], None],
    compute: Callable[[list[Tensor], Places], list[Tensor]],
    absorb: Callable[[np.ndarray, list[Tensor]], None],
) -> None:
    """Every rank's `outgoing` parts to all that hold keys for them, and results, shaped as `home`, back to it.

    While the results of step s are computed, the queries of the next `AHEAD` steps and the results of step s - 1 are on
    their way. The owner takes results in the order of the steps. `own` is called first, with False, and with True while
    the last results are on their way.
    """
    rank, size, queries = call.rank, call.size, call.needs.queries
    everything = np.ones(call.own.seq, dtype=bool)
    asked: dict[int, Exchange] = {}
    coming_home: dict[int, Exchange] = {}

    def ask(step: int) -> None:
        if step < size:
            holder, owner = (rank - step) % size, (rank + step) % size
            sends = [Send(pick(t, dim, everything, queries[rank][holder]), holder) for t, dim in outgoing]
            receives = [_receive(part, queries[owner][rank], owner) for part in outgoing]
            asked[step] = call.start(sends, receives, outgoing[0][0], tag=2 * step)

    def take(step: int) -> None:
        wanted = queries[rank][(rank - step) % size]
        results = coming_home.pop(step).wait()
        if wanted.any():
            absorb(wanted, results)

    for step in range(1, AHEAD + 1):
        ask(step)
    own(False)
    for step in range(1, size):
        parts = asked.pop(step).wait()
        ask(step + AHEAD)
        holder, owner = (rank - step) % size, (rank + step) % size
        wanted = queries[owner][rank]
        results = compute(parts, call.shards[owner].picked(wanted)) if wanted.any() else []
        sends = [Send(tensor, owner) for tensor in results]
        receives = [_receive(part, queries[rank][holder], holder) for part in home]
        coming_home[step] = call.start(sends, receives, outgoing[0][0], tag=2 * step + 1)
        if step > 1:
            take(step - 1)
    own(True)
    if size > 1:
        take(size - 1)


def _receive(part: tuple[Tensor, int], tokens: np.ndarray, source: int) -> Receive:
    tensor, dim = part
    shape = (*tensor.shape[:dim], int(tokens.sum()), *tensor.shape[dim + 1 :])
    return Receive(shape, tensor.dtype, source)


def _fold(result: Partial, tokens: np.ndarray, part: Partial) -> None:
    """Merges the part for some tokens into the result."""
    everything = np.ones_like(tokens)
    mine = Partial(pick(result.out, 1, everything, tokens), pick(result.lse, 2, everything, tokens))
    merge_(mine, part)
    if mine.out.untyped_storage().data_ptr() != result.out.untyped_storage().data_ptr():
        put(result.out, 1, everything, tokens, mine.out)
        put(result.lse, 2, everything, tokens, mine.lse)
