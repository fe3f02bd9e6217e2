"""Which strategy a pass takes, from what each would put on the wire and for how long, and why: `auto`.

Times are those of full chunks, L tokens a rank, all ranks alike, for which the bytes are `context/bytes.py`'s. While a
tile is computed the next exchange runs, so a step takes the longer of both; what nothing hides is added. A rank's links
are one duplex port, through which all it sends must pass, or a duplex link of its own to each other rank.

What follows, with H query heads, G key heads, 2-byte numbers, per step and divided by L d: a ring sends 4 G forward and
12 G backward; TokenRing sends 2 H out and 2 H home forward, 4 H out and 2 H home backward. Behind one port TokenRing
never wins forward, and backward for MHA alone. On links of their own out and home go at once, so its step is shorter
than a one-way ring's where H < 2 G forward and H < 3 G backward; a ring both ways halves its own, so that forward it is
a tie at H = G, but for the two steps' queries that TokenRing has under way, over more links than a ring uses. With
grouped queries, today's rule, rings win. A direct all-gather uses all links of a mesh at once, but holds the keys of
all ranks.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from armillary.comm.link import Link, with_unit
from armillary.kernels.attention.mask import Mask
from armillary.parallel.context.bytes import Sizes
from armillary.parallel.context.call import Heads
from armillary.parallel.context.token_ring import AHEAD
from armillary.parallel.context.ulysses import is_shared


@dataclass(frozen=True)
class Machine:
    """What is known of the ranks and what joins them; the same on every rank, or they would choose differently."""

    link: Link
    flops: float | None = None
    """Operations a second of a rank, so that what computing hides counts as hidden; None: nothing is hidden."""
    room: float | None = None
    """Bytes a rank has for other ranks' keys and gradients; None: any number."""
    inside: Link | None = None
    """The link inside a fast level, if hybrid is to be considered."""


@dataclass(frozen=True)
class Shape:
    """A call, all ranks alike."""

    ranks: int
    tokens: int
    """Of one rank, all rows together."""
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    causal: bool = True
    rows: int = 1
    """Rows of the batch, among which the tokens are shared out."""

    @property
    def every_head(self) -> Heads:
        return Heads(0, self.heads, self.heads // self.kv_heads)

    @property
    def sizes(self) -> Sizes:
        """Bytes of what travels for all tokens of a rank."""
        return Sizes(self.tokens, self.head_dim, self.itemsize)

    @property
    def keys(self) -> int:
        """Bytes of K and V."""
        return self.sizes.keys(self.kv_heads)

    @property
    def sums(self) -> int:
        """Bytes of dK and dV."""
        return self.sizes.sums(self.kv_heads)

    def tile(self, backward: bool, flops: float | None) -> float:
        """Seconds of one rank's tile over one other rank's keys, at `flops` operations a second; 0 for None."""
        work = 4 * self.tokens**2 / self.rows * self.heads * self.head_dim * (2.5 if backward else 1)
        return work * (0.5 if self.causal else 1) / flops if flops else 0.0


@dataclass(frozen=True)
class Choice:
    """A strategy, with what each would take in seconds, and a sentence."""

    strategy: str
    seconds: dict[str, float]
    why: str


SAME = 1.01
"""Times within this factor count as equal: the simpler strategy is taken, the first of `TIMES`."""


@lru_cache(maxsize=1024)
def choose(
    shape: Shape, machine: Machine, backward: bool, *, mask: Mask | None = None, level: int | None = None
) -> Choice:
    """The strategy for one pass.

    Args:
        shape: of the call.
        machine: that computes it.
        backward: the backward pass, else the forward pass.
        mask: what a query sees; None for `shape.causal` alone.
        level: ranks of a fast level, for hybrid.
    """
    name = "backward" if backward else "forward"
    if mask is not None and mask.window and not mask.sinks and not mask.stride:
        why = (
            f"{name}: all_gather, because queries see {mask.window} positions only: neighbours exchange those directly"
        )
        return Choice("all_gather", {}, why)
    link, room, inside = machine.link, machine.room, machine.inside
    tile = shape.tile(backward, machine.flops)
    seconds = {strategy: time(shape, link, backward, tile) for strategy, time in TIMES.items()}
    if level and inside and level < shape.ranks and shape.ranks % level == 0:
        seconds["hybrid"] = hybrid_seconds(shape, link, backward, tile, level, inside)
    allowed = dict(seconds)
    held = (shape.ranks - 1) * (shape.keys + (shape.sums if backward else 0))
    left_out = ""
    if room is not None and held > room:
        del allowed["all_gather"]
        left_out = f"; all_gather is left out: it holds {with_unit(held, 'B')} and has room for {with_unit(room, 'B')}"
    best = min(allowed.values())
    chosen = next(strategy for strategy, time in allowed.items() if time <= best * SAME)
    times = ", ".join(f"{strategy} {with_unit(time, 's')}" for strategy, time in seconds.items())
    why = (
        f"{name}: {chosen}, of {times}, for {shape.ranks} ranks of {shape.tokens} tokens, {shape.heads} heads and "
        f"{shape.kv_heads} key heads of {shape.head_dim}, {link}{left_out}"
    )
    return Choice(chosen, seconds, why)


def ring_seconds(shape: Shape, link: Link, backward: bool, tile: float, ways: int = 1) -> float:
    """P - 1 steps while P tiles are computed; backward the sums of dK and dV follow one step behind, the last home."""
    if shape.ranks == 1:
        return tile
    # Two directions help only where they are two links.
    share = 2 if ways == 2 and link.own_links and shape.ranks > 2 else 1
    keys, sums = link.seconds(shape.keys / share), link.seconds(shape.sums / share)
    if not backward:
        return (shape.ranks - 1) * max(tile, keys) + tile
    return max(tile, keys) + (shape.ranks - 2) * max(tile, keys + sums) + tile + sums


def token_ring_seconds(shape: Shape, link: Link, backward: bool, tile: float) -> float:
    """Step after step queries arrive, a tile is computed and results go home; nothing hides the last way home.

    Through a port one message passes after the other; on links of their own all go at once, the queries of two steps.
    """
    out, home = shape.sizes.token_ring(shape.heads, backward)
    port = 0.0

    def arrival(ready: float, num_bytes: float) -> float:
        nonlocal port
        if link.own_links:
            return ready + link.seconds(num_bytes)
        port = max(port, ready) + link.seconds(num_bytes)
        return port

    asked = [arrival(0.0, out) for _ in range(AHEAD)]
    done, at_home = tile, 0.0
    for step in range(1, shape.ranks):
        begin = max(done, asked[step - 1])
        if step + AHEAD < shape.ranks:
            asked.append(arrival(begin, out))
        done = begin + tile
        at_home = arrival(done, home)
    return max(done, at_home)


def gather_seconds(shape: Shape, link: Link, backward: bool, tile: float) -> float:
    """On links of their own everything comes at once; behind a port one rank's after the other's, as in a ring."""
    if not link.own_links or shape.ranks == 1:
        return ring_seconds(shape, link, backward, tile)
    home = link.seconds(shape.sums) if backward else 0.0
    return max(tile, link.seconds(shape.keys)) + (shape.ranks - 1) * tile + home


def ulysses_seconds(shape: Shape, link: Link, backward: bool, tile: float) -> float:
    """Two swaps that nothing hides, around tiles of the heads of the busiest rank."""
    size = shape.ranks
    if size == 1:
        return tile
    parts = shape.every_head.split(size)
    swaps = [shape.sizes.swap(part, backward, is_shared(parts)) for part in parts]
    out, home = max(out for out, _ in swaps), max(home for _, home in swaps)
    heads = max(part.num for part in parts)
    others = 1 if link.own_links else size - 1
    # A tile of all heads over one rank's keys; here the busiest rank's heads over the whole length, P by P such tiles.
    computing = tile * size * heads * size / shape.heads
    return link.seconds(out * others) + link.seconds(home * others) + computing


def hybrid_seconds(shape: Shape, link: Link, backward: bool, tile: float, level: int, inside: Link) -> float:
    """Ulysses inside a level, without its computing, and a ring across of longer shards with fewer heads."""
    parts = shape.every_head.split(level)
    heads, keys = max(part.num for part in parts), max(part.num_kv for part in parts)
    swap = replace(shape, ranks=level)
    across = replace(shape, ranks=shape.ranks // level, tokens=shape.tokens * level, heads=heads, kv_heads=keys)
    longer = tile * level * level * heads / shape.heads
    return ulysses_seconds(swap, inside, backward, 0.0) + ring_seconds(across, link, backward, longer)


def both_ways_seconds(shape: Shape, link: Link, backward: bool, tile: float) -> float:
    return ring_seconds(shape, link, backward, tile, ways=2)


TIMES = {
    "ring": ring_seconds,
    "bidirectional_ring": both_ways_seconds,
    "all_gather": gather_seconds,
    "token_ring": token_ring_seconds,
    "ulysses": ulysses_seconds,
}
"""From the simplest on."""
