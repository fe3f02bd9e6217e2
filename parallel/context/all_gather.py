"""All-gather: every rank gets the keys and values that its queries see, straight from the ranks that hold them.

With a window and contiguous shards this is the halo exchange: neighbours send the window's tokens and nothing else.
All exchanges start at once, and each tile is computed as soon as its keys are there. Backward: dK and dV go home in
float32, and the owner adds them in rank order: a reduce-scatter of what was touched. Sources: Chu et al. 2024 (Llama
3's context parallelism); halo exchange, as in stencil codes.
"""

import numpy as np
import torch
from torch import Tensor

from armillary.comm.exchange import Exchange, Receive, Send
from armillary.kernels.attention.call import Partial
from armillary.parallel.context.call import (
    Call,
    Sums,
    add,
    own_backward,
    pick,
    tile_backward,
    tile_forward,
    wide,
)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial:
    coming = _gather(k, v, call)
    result = tile_forward(q, k, v, call, call.own, call.own, call.heads, dtype=wide(q.dtype))
    for distance, flight in enumerate(coming, start=1):
        (both,) = flight.wait()
        owner = (call.rank - distance) % call.size
        wanted = call.needs.keys[call.rank][owner]
        if wanted.any():
            places = call.shards[owner].picked(wanted)
            tile_forward(q, both[0], both[1], call, call.own, places, call.heads, result)
    return Partial(result.out.to(q.dtype), result.lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call) -> Sums:
    total = Sums.empty(q, k, v)
    coming = _gather(k, v, call)
    own_backward((d_out, q, k, v, lse, delta), call, total, last=False)
    going = []
    for distance, flight in enumerate(coming, start=1):
        (both,) = flight.wait()
        owner, asking = (call.rank - distance) % call.size, (call.rank + distance) % call.size
        wanted = call.needs.keys[call.rank][owner]
        new = torch.zeros(both.shape, dtype=wide(k.dtype), device=k.device)
        if wanted.any():
            inputs, places = (d_out, q, both[0], both[1], lse, delta), call.shards[owner].picked(wanted)
            tile_backward(inputs, call, call.own, places, call.heads, Sums(total.q, new[0], new[1]))
        shape = (2, k.shape[0], int(call.needs.keys[asking][call.rank].sum()), *k.shape[2:])
        going.append(call.start([Send(new, owner)], [Receive(shape, new.dtype, asking)], k, tag=call.size + distance))
    own_backward((d_out, q, k, v, lse, delta), call, total, last=True)
    return _summed(total, going, call)


def _gather(k: Tensor, v: Tensor, call: Call) -> list[Exchange]:
    """Starts the exchanges; number i is with the ranks i + 1 before and after this one."""
    both, keys, everything = torch.stack([k, v]), call.needs.keys, np.ones(call.own.seq, dtype=bool)
    flights = []
    for distance in range(1, call.size):
        asking, owner = (call.rank + distance) % call.size, (call.rank - distance) % call.size
        shape = (2, k.shape[0], int(keys[call.rank][owner].sum()), *k.shape[2:])
        sends = [Send(pick(both, 2, everything, keys[asking][call.rank]), asking)]
        flights.append(call.start(sends, [Receive(shape, k.dtype, owner)], k, tag=distance))
    return flights


def _summed(total: Sums, going: list[Exchange], call: Call) -> Sums:
    """`total`, to whose dK and dV the other ranks' are added, all in rank order."""
    parts = {(call.rank + distance) % call.size: flight.wait()[0] for distance, flight in enumerate(going, start=1)}
    own = torch.stack([total.k, total.v])
    both = torch.zeros_like(own)
    for rank in range(call.size):
        wanted = call.needs.keys[rank][call.rank]
        if rank == call.rank:
            both += own
        elif wanted.any():
            add(both, 2, np.ones_like(wanted), wanted, parts[rank])
    return total._replace(k=both[0], v=both[1])
