"""Ulysses: ranks that share tokens out swap them for heads, and each computes its heads over all tokens.

The degree need not divide anything: query heads are shared out in stretches whose lengths differ by one at most (a rank
may get none), and a key head that several ranks need goes to each of them; their float32 gradients add up at home, in
rank order. Tokens may be shared out unevenly too.

Hybrid: the ranks in levels of `degree` neighbours; Ulysses inside a level, where links are fast, and a ring across
levels, among the ranks that have the same heads. With one level it is plain Ulysses, and the ring has one rank.
Sources: Jacobs et al. 2023 (DeepSpeed Ulysses); Fang and Zhao 2024 (USP).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from armillary.comm.exchange import Receive, Send
from armillary.kernels.attention.call import Partial
from armillary.kernels.attention.places import Places
from armillary.parallel.context import ring
from armillary.parallel.context.call import Call, Heads, Sums, wide

OUT, HOME = 1 << 16, (1 << 16) + 1
"""Tags, above those of the ring across levels."""


@dataclass(frozen=True)
class Level:
    """This rank's level: the ranks of it, the heads of each, and the call across levels."""

    members: tuple[int, ...]
    """Numbers in the whole call."""
    here: int
    """This rank's number in the level."""
    heads: tuple[Heads, ...]
    across: Call


def level_of(call: Call, degree: int) -> Level:
    """The levels are stretches of `degree` ranks.

    Raises:
        ValueError: if `degree` does not divide the number of ranks.
    """
    if degree < 1 or call.size % degree:
        raise ValueError(
            f"plan.context: hybrid levels of {degree} ranks do not divide the {call.size} ranks of a context group; "
            f"choose a divisor of {call.size}"
        )
    number, here = divmod(call.rank, degree)
    heads = call.heads.split(degree)

    def join() -> tuple[Places, ...]:
        return tuple(Places.joined(call.shards[i : i + degree]) for i in range(0, call.size, degree))

    shards = call.own.derived(("levels", tuple(places.key for places in call.shards), degree), join)
    peers = call.peers[here::degree]
    across = replace(call, shards=shards, rank=number, peers=peers, heads=heads[here])
    return Level(tuple(range(number * degree, (number + 1) * degree)), here, heads, across)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, degree: int) -> Partial:
    level = level_of(call, degree)
    (all_q,), (all_kv,) = _swap(call, level, [(q, 1)], [(torch.stack([k, v]), 2)])
    result = ring.forward(all_q, all_kv[0], all_kv[1], level.across)
    out, lse = _swap_back(call, level, [(result.out, 1), (result.lse, 2)])
    return Partial(torch.cat(out, 2), torch.cat(lse, 1))


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call, degree: int
) -> Sums:
    level = level_of(call, degree)
    queries, (all_kv,) = _swap(call, level, [(d_out, 1), (q, 1), (lse, 2), (delta, 2)], [(torch.stack([k, v]), 2)])
    all_d_out, all_q, all_lse, all_delta = queries
    d_q, d_k, d_v = ring.backward(all_d_out, all_q, all_kv[0], all_kv[1], all_lse, all_delta, level.across)
    # Where each key head has one user here, its sum is whole, and is rounded once wherever that happens.
    shared = is_shared(level.heads)
    d_kv = torch.stack([d_k, d_v]).to(wide(k.dtype) if shared else k.dtype)
    q_parts, kv_parts = _swap_back(call, level, [(d_q.to(q.dtype), 1), (d_kv, 2)])
    total = torch.zeros(2, *k.shape, dtype=wide(k.dtype), device=k.device)
    for heads, part in zip(level.heads, kv_parts, strict=True):
        total[:, :, :, heads.within(call.heads)[1]] += part
    return Sums(torch.cat(q_parts, 2).to(total.dtype), total[0], total[1])


def is_shared(heads: Sequence[Heads]) -> bool:
    """Whether some key head has users on two ranks."""
    return sum(part.num_kv for part in heads) > max(part.kv_stop for part in heads) - heads[0].kv_first


def _swap(
    call: Call, level: Level, of_queries: list[tuple[Tensor, int]], of_keys: list[tuple[Tensor, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Sends every member its heads of this rank's tokens; returns this rank's heads of all members' tokens.

    Tensors come with the dim that counts tokens; heads are beside it, before it for lse and delta.
    """
    tensors = [(t, dim, 0) for t, dim in of_queries] + [(t, dim, 1) for t, dim in of_keys]
    sends, receives, own = [], [], []
    for number, member in enumerate(level.members):
        for tensor, dim, kind in tensors:
            heads_dim = _heads_dim(tensor, dim)
            where = level.heads[number].within(call.heads)[kind]
            part = tensor.narrow(heads_dim, where.start, where.stop - where.start)
            if number == level.here:
                own.append(part)
                continue
            sends.append(Send(part, member))
            shape = list(tensor.shape)
            mine = level.heads[level.here].within(call.heads)[kind]
            shape[dim], shape[heads_dim] = call.shards[member].seq, mine.stop - mine.start
            receives.append(Receive(tuple(shape), tensor.dtype, member))
    received = call.start(sends, receives, of_queries[0][0], tag=OUT).wait()
    parts = _with_own(received, own, level, len(tensors))
    joined = [torch.cat(each, dim) for each, (_, dim, _) in zip(parts, tensors, strict=True)]
    return joined[: len(of_queries)], joined[len(of_queries) :]


def _swap_back(call: Call, level: Level, tensors: list[tuple[Tensor, int]]) -> list[list[Tensor]]:
    """Sends every member its tokens of this rank's heads; returns, for each tensor, this rank's tokens of each member's
    heads: key heads for tensors of five dims, which hold two, else query heads."""
    sends, receives, own = [], [], []
    start = 0
    for number, member in enumerate(level.members):
        seq = call.shards[member].seq
        for tensor, dim in tensors:
            part = tensor.narrow(dim, start, seq)
            if number == level.here:
                own.append(part)
                continue
            sends.append(Send(part, member))
            shape = list(tensor.shape)
            where = level.heads[number].within(call.heads)[int(tensor.dim() == 5)]
            shape[dim], shape[_heads_dim(tensor, dim)] = call.own.seq, where.stop - where.start
            receives.append(Receive(tuple(shape), tensor.dtype, member))
        start += seq
    received = call.start(sends, receives, tensors[0][0], tag=HOME).wait()
    return _with_own(received, own, level, len(tensors))


def _heads_dim(tensor: Tensor, dim: int) -> int:
    return dim - 1 if tensor.dim() == 3 else dim + 1


def _with_own(received: list[Tensor], own: list[Tensor], level: Level, count: int) -> list[list[Tensor]]:
    """For each of `count` tensors the parts of all members, in their order."""
    parts = [received[i : i + count] for i in range(0, len(received), count)]
    parts.insert(level.here, own)
    return [list(each) for each in zip(*parts, strict=True)]
