"""TokenRing: queries go out and partial results come home, keys and values never move.

In step s rank r sends the queries that rank r - s needs straight to it and computes for those that came from rank
r + s; meanwhile the results of the step before go straight home, the other way. Nothing is relayed. Backward is alike:
Q, dO, lse and delta go out, dQ comes home, and dK and dV add up where the keys are, in float32.

Sources: Wang et al. 2024 (TokenRing) for the forward pass, whose queries are relayed from rank to rank; the backward
pass, and sending direct, are ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from armillary.comm.exchange import Exchange, Receive, Send
from armillary.kernels.attention import Gradients, Partial
from armillary.kernels.merge import merge_
from armillary.kernels.places import Places
from armillary.parallel.context_call import (
    Call,
    add,
    empty_gradients,
    pick,
    put,
    tile_backward,
    tile_forward,
    wide,
)

Parts = list[tuple[Tensor, int]]
"""Tensors of all of a rank's tokens, each with the dim that counts them."""


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial:
    result: Partial | None = None

    def compute(parts: list[Tensor], places: Places) -> list[Tensor]:
        return list(tile_forward(parts[0], k, v, call, places, call.own, call.heads))

    def own() -> None:
        nonlocal result
        result = tile_forward(q, k, v, call, call.own, call.own, call.heads, dtype=wide(q.dtype))

    def absorb(tokens: np.ndarray, parts: list[Tensor]) -> None:
        assert result is not None
        _fold(result, tokens, Partial(*parts))

    home = [(q, 1), (torch.empty(q.shape[0], q.shape[2], 0, dtype=wide(q.dtype), device=q.device), 2)]
    _circulate(call, [(q, 1)], home, own, compute, absorb)
    assert result is not None
    return Partial(result.out.to(q.dtype), result.lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call) -> Gradients:
    total = empty_gradients(q, k, v)

    def compute(parts: list[Tensor], places: Places) -> list[Tensor]:
        their_q, their_d_out, their_lse, their_delta = parts
        d_q = torch.zeros(their_q.shape, dtype=wide(q.dtype), device=q.device)
        inputs = their_d_out, their_q, k, v, their_lse, their_delta
        tile_backward(inputs, call, places, call.own, call.heads, total._replace(q=d_q))
        return [d_q.to(q.dtype)]

    def own() -> None:
        tile_backward((d_out, q, k, v, lse, delta), call, call.own, call.own, call.heads, total)

    def absorb(tokens: np.ndarray, parts: list[Tensor]) -> None:
        assert total.q is not None
        add(total.q, 1, np.ones_like(tokens), tokens, parts[0])

    _circulate(call, [(q, 1), (d_out, 1), (lse, 2), (delta, 2)], [(q, 1)], own, compute, absorb)
    return total


def _circulate(
    call: Call,
    outgoing: Parts,
    home: Parts,
    own: Callable[[], None],
    compute: Callable[[list[Tensor], Places], list[Tensor]],
    absorb: Callable[[np.ndarray, list[Tensor]], None],
) -> None:
    """Every rank's `outgoing` parts to all that hold keys for them, and results, shaped as `home`, back to it.

    In step s: the exchange with the queries of step s + 1 and the results of step s - 1 runs while the results of step
    s are computed. The owner takes results in the order of the steps.
    """
    rank, size, queries = call.rank, call.size, call.needs.queries
    parts: list[Tensor] = []
    results: list[Tensor] = []
    for step in range(size + 1):
        ahead, holder, owner = step + 1, (rank - step + 1) % size, (rank + step - 1) % size
        sends, receives, expected = [], [], 0
        if ahead < size:
            towards, source = (rank - ahead) % size, (rank + ahead) % size
            everything = np.ones(call.own.seq, dtype=bool)
            sends += [Send(pick(t, dim, everything, queries[rank][towards]), towards) for t, dim in outgoing]
            receives += [_receive(part, queries[source][rank], source) for part in outgoing]
            expected = len(receives)
        if step >= 2:
            sends += [Send(tensor, owner) for tensor in results]
            receives += [_receive(part, queries[rank][holder], holder) for part in home]
        flight: Exchange = call.start(sends, receives, outgoing[0][0], tag=step)
        results = []
        if step == 0:
            own()
        elif step < size:
            asking = (rank + step) % size
            wanted = queries[asking][rank]
            if wanted.any():
                results = compute(parts, call.shards[asking].picked(wanted))
        received = flight.wait()
        parts, returned = received[:expected], received[expected:]
        if returned and queries[rank][holder].any():
            absorb(queries[rank][holder], returned)


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
