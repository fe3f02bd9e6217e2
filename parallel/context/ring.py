"""Ring attention: keys and values go from neighbour to neighbour, queries and results stay.

A chunk is a rank's K and V together, (2, batch, tokens, kv_heads, head_dim). At distance t from its owner it holds the
tokens that some rank at distance t or more sees, so it shrinks on its way and goes no further than it is needed. In the
backward pass the float32 sums of dK and dV follow one step behind, and go from the last rank that adds to them straight
home. The next exchange is under way while a tile is computed.

Both ways at once (`Lane`): half the key heads go round one way and half the other; where their number is odd, half the
tokens. Sources: Liu et al. 2023 (Ring Attention); Zhu 2024 (ring-flash-attention).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armillary.comm.exchange import Exchange, Receive, Send
from armillary.kernels.attention.call import Partial
from armillary.kernels.attention.places import Places
from armillary.parallel.context.call import (
    Call,
    Heads,
    Sums,
    add,
    own_backward,
    pick,
    tile_backward,
    tile_forward,
    wide,
)


@dataclass(frozen=True)
class Lane:
    """What goes round one way."""

    way: int
    """1: chunks go to the next rank; -1: to the one before."""
    heads: Heads
    half: int | None = None
    """0 or 1: the first or second half of every rank's tokens only."""

    def owner(self, call: Call, distance: int) -> int:
        """Whose chunk this rank has after `distance` steps."""
        return (call.rank - self.way * distance) % call.size


def one_way(heads: Heads) -> tuple[Lane, ...]:
    return (Lane(1, heads),)


def both_ways(heads: Heads) -> tuple[Lane, ...]:
    """Half of what moves each way."""
    if heads.num_kv % 2:
        return Lane(1, heads, half=0), Lane(-1, heads, half=1)
    middle = heads.kv_first + heads.num_kv // 2
    first, second = heads.of_keys(heads.kv_first, middle), heads.of_keys(middle, heads.kv_stop)
    return Lane(1, first), Lane(-1, second)


@dataclass(frozen=True)
class Route:
    """One chunk's way: which of the owner's tokens matter how far from it; bool arrays (tokens,)."""

    seen: np.ndarray
    """Whether the rank at each distance computes with each token, bool (ranks, tokens); false at distance 0, since the
    owner's own tile is not the ring's."""
    furthest: np.ndarray
    """Where each token is seen last, int64 (tokens,); 0 if nowhere."""
    nearest: np.ndarray
    """Where it is seen first; the number of ranks if nowhere."""

    def wanted(self, distance: int) -> np.ndarray:
        """What the rank there computes with."""
        return self.seen[distance]

    def carried(self, distance: int) -> np.ndarray:
        """What arrives there: wanted there or further on; at distance 0, all tokens."""
        return self.furthest >= distance

    def touched(self, distance: int) -> np.ndarray:
        """What has been wanted there or before: the tokens whose gradients leave that rank."""
        return self.nearest <= distance

    @property
    def last(self) -> int:
        """The furthest rank that wants anything; 0 if none does."""
        return int(self.furthest.max(initial=0))


def route_of(call: Call, lane: Lane, owner: int) -> Route:
    """The way of `owner`'s chunk in a lane; a pure function of the call's places and mask, kept."""

    def make() -> Route:
        size, seq = call.size, call.shards[owner].seq
        keys = call.needs.keys
        seen = np.stack([keys[(owner + lane.way * distance) % size][owner] for distance in range(size)])
        seen[0] = False
        if lane.half is not None:
            seen &= (np.arange(seq) >= seq // 2) == bool(lane.half)
        nowhere = ~seen.any(0)
        furthest = np.where(nowhere, 0, size - 1 - seen[::-1].argmax(0))
        return Route(seen, furthest, np.where(nowhere, size, seen.argmax(0)))

    everyone = tuple(places.key for places in call.shards)
    return call.own.derived(("route", everyone, call.mask, lane.way, lane.half, owner), make)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial:
    return _forward(q, k, v, call, one_way(call.heads))


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call) -> Sums:
    return _backward((d_out, q, k, v, lse, delta), call, one_way(call.heads))


def forward_both_ways(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial:
    return _forward(q, k, v, call, both_ways(call.heads))


def backward_both_ways(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call) -> Sums:
    return _backward((d_out, q, k, v, lse, delta), call, both_ways(call.heads))


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, lanes: tuple[Lane, ...]) -> Partial:
    chunks = _own_chunks(k, v, call, lanes)
    result = None
    for distance in range(call.size):
        coming = _pass_on(chunks, call, lanes, distance)
        if result is None:
            result = tile_forward(q, k, v, call, call.own, call.own, call.heads, dtype=wide(q.dtype))
        else:
            for lane, chunk in zip(lanes, chunks, strict=True):
                tile = _wanted(chunk, call, lane, distance)
                if tile is not None:
                    ours, _ = lane.heads.within(call.heads)
                    into = Partial(result.out[:, :, ours], result.lse[:, ours])
                    tile_forward(q[:, :, ours], tile[0][0], tile[0][1], call, call.own, tile[1], lane.heads, into)
        chunks = coming.wait()
    assert result is not None
    return Partial(result.out.to(q.dtype), result.lse)


def _backward(inputs: tuple[Tensor, ...], call: Call, lanes: tuple[Lane, ...]) -> Sums:
    _, q, k, v, _, _ = inputs
    total = Sums.empty(q, k, v)
    chunks = _own_chunks(k, v, call, lanes)
    sums = _TravellingSums(call, lanes, k)
    for distance in range(call.size):
        coming = _pass_on(chunks, call, lanes, distance)
        if distance == 0:
            own_backward(inputs, call, total, last=False)
        else:
            new = [
                _gradients(inputs, chunk, call, lane, distance, total)
                for lane, chunk in zip(lanes, chunks, strict=True)
            ]
            sums.pass_on(new, distance)
        chunks = coming.wait()
    own_backward(inputs, call, total, last=True)
    for lane, home in zip(lanes, sums.came_home(), strict=True):
        if home is not None:
            _, theirs = lane.heads.within(call.heads)
            route = route_of(call, lane, call.rank)
            for gradient, part in zip((total.k, total.v), home, strict=True):
                add(gradient[:, :, theirs], 1, route.carried(0), route.touched(route.last), part)
    return total


def _own_chunks(k: Tensor, v: Tensor, call: Call, lanes: tuple[Lane, ...]) -> list[Tensor]:
    if call.size == 1:
        return [k] * len(lanes)
    both = torch.stack([k, v])
    return [both[:, :, :, lane.heads.within(call.heads)[1]] for lane in lanes]


def _pass_on(chunks: list[Tensor], call: Call, lanes: tuple[Lane, ...], distance: int) -> Exchange:
    """Starts each lane's step from `distance` to the next."""
    sends, receives = [], []
    for lane, chunk in zip(lanes, chunks, strict=True) if distance + 1 < call.size else ():
        here = route_of(call, lane, lane.owner(call, distance)).carried
        sends.append(Send(pick(chunk, 2, here(distance), here(distance + 1)), (call.rank + lane.way) % call.size))
        there = route_of(call, lane, lane.owner(call, distance + 1)).carried
        shape = (2, chunk.shape[1], int(there(distance + 1).sum()), *chunk.shape[3:])
        receives.append(Receive(shape, chunk.dtype, (call.rank - lane.way) % call.size))
    return call.start(sends, receives, chunks[0], tag=2 * distance)


def _wanted(chunk: Tensor, call: Call, lane: Lane, distance: int) -> tuple[Tensor, Places] | None:
    """The part of the chunk that this rank computes with, and its places; None if there is none."""
    owner = lane.owner(call, distance)
    route = route_of(call, lane, owner)
    wanted = route.wanted(distance)
    if not wanted.any():
        return None
    return pick(chunk, 2, route.carried(distance), wanted), call.shards[owner].picked(wanted)


def _gradients(
    inputs: tuple[Tensor, ...], chunk: Tensor, call: Call, lane: Lane, distance: int, total: Sums
) -> Tensor | None:
    """This rank's dK and dV for the chunk's wanted tokens, stacked; adds to dQ."""
    tile = _wanted(chunk, call, lane, distance)
    if tile is None:
        return None
    (k, v), places = tile
    d_out, q, _, _, lse, delta = inputs
    ours, _ = lane.heads.within(call.heads)
    new = torch.zeros(tile[0].shape, dtype=wide(k.dtype), device=k.device)
    mine = d_out[:, :, ours], q[:, :, ours], k, v, lse[:, ours], delta[:, ours]
    tile_backward(mine, call, call.own, places, lane.heads, Sums(total.q[:, :, ours], new[0], new[1]))
    return new


class _TravellingSums:
    """The sums of dK and dV that follow the chunks, one for each lane."""

    def __init__(self, call: Call, lanes: tuple[Lane, ...], like: Tensor) -> None:
        self.call, self.lanes, self.like = call, lanes, like
        self.under_way: tuple[Exchange, list[tuple[int, bool]]] | None = None
        self.home: list[Tensor | None] = [None] * len(lanes)

    def pass_on(self, new: list[Tensor | None], distance: int) -> None:
        """Adds what this rank has `new` at `distance` to what has come, and sends it to the next rank, or home."""
        call = self.call
        arrived = self._arrived()
        sends, receives, labels = [], [], []
        for number, lane in enumerate(self.lanes):
            owner = lane.owner(call, distance)
            route = route_of(call, lane, owner)
            if distance <= route.last and route.touched(distance).any():
                total = _joined(arrived[number], new[number], route, distance)
                to = (call.rank + lane.way) % call.size if distance < route.last else owner
                sends.append(Send(total, to))
            following = route_of(call, lane, lane.owner(call, distance + 1))
            if distance < following.last and following.touched(distance).any():
                receives.append(self._receive(lane, following, distance, call.rank - lane.way))
                labels.append((number, False))
            own = route_of(call, lane, call.rank)
            if distance == own.last:
                receives.append(self._receive(lane, own, distance, call.rank + lane.way * distance))
                labels.append((number, True))
        self.under_way = call.start(sends, receives, self.like, tag=2 * distance + 1), labels

    def came_home(self) -> list[Tensor | None]:
        """The sums of this rank's own chunk, lane by lane."""
        self._arrived()
        return self.home

    def _receive(self, lane: Lane, route: Route, distance: int, source: int) -> Receive:
        batch, _, _, head_dim = self.like.shape
        shape = (2, batch, int(route.touched(distance).sum()), lane.heads.num_kv, head_dim)
        return Receive(shape, wide(self.like.dtype), source % self.call.size)

    def _arrived(self) -> list[Tensor | None]:
        arrived: list[Tensor | None] = [None] * len(self.lanes)
        if self.under_way is not None:
            flight, labels = self.under_way
            for (number, home), tensor in zip(labels, flight.wait(), strict=True):
                (self.home if home else arrived)[number] = tensor
        self.under_way = None
        return arrived


def _joined(arrived: Tensor | None, new: Tensor | None, route: Route, distance: int) -> Tensor:
    """Sums over the tokens touched so far; `arrived` may be changed."""
    before, now = route.touched(distance - 1), route.touched(distance)
    if arrived is None:
        assert new is not None
        return new
    total = arrived
    if not np.array_equal(before, now):
        total = arrived.new_zeros(*arrived.shape[:2], int(now.sum()), *arrived.shape[3:])
        add(total, 2, now, before, arrived)
    if new is not None:
        add(total, 2, now, route.wanted(distance), new)
    return total
