"""How many bytes each strategy moves, by formula: what the ledger must show, and what a choice is made by.

Written from the tables of who needs which tokens, not from the strategies' code. With everything needed by everyone, L
tokens a rank and B bytes a number, one rank sends in each of its P - 1 steps:

    pass      ring, gather          token_ring out          home
    forward   2 G d B L             H d B L                 (H d B + 4 H) L
    backward  2 G d (B + 4) L       (2 H d B + 8 H) L       H d B L

with H query heads, G key heads and d channels a head; the ring's gradients take P - 1 steps too, the last one home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.parallel.context.call import Heads
from armillary.parallel.context.needs import Needs, needs_of


@dataclass(frozen=True)
class Sizes:
    """Bytes of one token's share in what travels; of a token in each of `batch` rows."""

    batch: int
    head_dim: int
    itemsize: int

    @property
    def wide(self) -> int:
        """Bytes of a number in a sum, which is float32 at least."""
        return max(4, self.itemsize)

    def queries(self, num: int) -> int:
        """Q, dO, dQ, or a result's out."""
        return self.batch * num * self.head_dim * self.itemsize

    def rows(self, num: int) -> int:
        """lse or delta."""
        return self.batch * num * self.wide

    def keys(self, num_kv: int) -> int:
        """K and V."""
        return 2 * self.batch * num_kv * self.head_dim * self.itemsize

    def sums(self, num_kv: int) -> int:
        """dK and dV, summed over ranks."""
        return 2 * self.batch * num_kv * self.head_dim * self.wide

    def token_ring(self, num: int, backward: bool) -> tuple[int, int]:
        """Of a query: what goes out, and what comes home."""
        if backward:
            return 2 * self.queries(num) + 2 * self.rows(num), self.queries(num)
        return self.queries(num), self.queries(num) + self.rows(num)

    def swap(self, heads: Heads, backward: bool, shared: bool) -> tuple[int, int]:
        """Of a token swapped for `heads`: what goes out, and what comes home; `shared` as `ulysses.is_shared` says."""
        out, home = self.queries(heads.num) + self.keys(heads.num_kv), self.queries(heads.num) + self.rows(heads.num)
        if backward:
            out += self.queries(heads.num) + 2 * self.rows(heads.num)
            home = self.queries(heads.num) + (self.sums(heads.num_kv) if shared else self.keys(heads.num_kv))
        return out, home


def bytes_sent(
    strategy: str,
    backward: bool,
    shards: Sequence[Places],
    mask: Mask,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    level: int | None = None,
) -> list[int]:
    """Bytes that each rank sends in one pass of one call.

    Args:
        strategy: a name of `parallel.context.core.STRATEGIES`.
        backward: the backward pass, else the forward pass.
        shards: places of every rank's tokens.
        mask: what queries see.
        heads, kv_heads, head_dim: of the call.
        dtype: of q, k and v.
        level: of hybrid, for which it must be given.

    Raises:
        KeyError: for an unknown strategy.
    """
    sizes = Sizes(shards[0].batch, head_dim, dtype.itemsize)
    every = Heads(0, heads, heads // kv_heads)
    if strategy in ("ulysses", "hybrid"):
        degree = len(shards) if strategy == "ulysses" else level
        assert degree, "hybrid needs the ranks of a level"
        return _levels(backward, shards, mask, sizes, every, degree)
    return FLAT[strategy](needs_of(shards, mask), sizes, every, backward)


def _ring(needs: Needs, sizes: Sizes, heads: Heads, backward: bool) -> list[int]:
    return _lane(needs, sizes, heads, backward, 1, None)


def _both_ways(needs: Needs, sizes: Sizes, heads: Heads, backward: bool) -> list[int]:
    if heads.num_kv % 2:
        parts = [_lane(needs, sizes, heads, backward, way, half) for way, half in ((1, 0), (-1, 1))]
    else:
        middle = heads.kv_first + heads.num_kv // 2
        first, second = heads.of_keys(0, middle), heads.of_keys(middle, heads.kv_stop)
        parts = [_lane(needs, sizes, half, backward, way, None) for half, way in ((first, 1), (second, -1))]
    return [sum(both) for both in zip(*parts, strict=True)]


def _lane(needs: Needs, sizes: Sizes, heads: Heads, backward: bool, way: int, half: int | None) -> list[int]:
    """A token travels as far as the furthest rank that sees it; its gradients from the first such rank to the last one
    that any token of the chunk has, and home."""
    size = len(needs.keys)
    sent = [0] * size
    for owner in range(size):
        seen = np.stack([needs.keys[(owner + way * distance) % size][owner] for distance in range(size)])
        seen[0] = False
        if half is not None:
            middle = seen.shape[1] // 2
            seen[:, slice(middle, None) if half == 0 else slice(0, middle)] = False
        distances = np.arange(size)[:, None]
        furthest = np.where(seen, distances, 0).max(0)
        nearest = np.where(seen, distances, size).min(0)
        last = int(furthest.max(initial=0))
        for distance in range(last + 1):
            holder = (owner + way * distance) % size
            sent[holder] += int((furthest > distance).sum()) * sizes.keys(heads.num_kv)
            if backward:
                sent[holder] += int((nearest <= distance).sum()) * sizes.sums(heads.num_kv)
    return sent


def _token_ring(needs: Needs, sizes: Sizes, heads: Heads, backward: bool) -> list[int]:
    count, (out, home) = _counts(needs.queries), sizes.token_ring(heads.num, backward)
    return [int(out * count[rank].sum() + home * count[:, rank].sum()) for rank in range(len(count))]


def _gather(needs: Needs, sizes: Sizes, heads: Heads, backward: bool) -> list[int]:
    count = _counts(needs.keys)
    out, home = sizes.keys(heads.num_kv), sizes.sums(heads.num_kv) if backward else 0
    return [int(out * count[:, rank].sum() + home * count[rank].sum()) for rank in range(len(count))]


FLAT = {"ring": _ring, "bidirectional_ring": _both_ways, "token_ring": _token_ring, "all_gather": _gather}


def _counts(table: tuple[tuple[np.ndarray, ...], ...]) -> np.ndarray:
    """Tokens in each entry, none for a rank with itself: int64 (ranks, ranks)."""
    counts = np.array([[int(tokens.sum()) for tokens in row] for row in table])
    np.fill_diagonal(counts, 0)
    return counts


def _levels(backward: bool, shards: Sequence[Places], mask: Mask, sizes: Sizes, every: Heads, degree: int) -> list[int]:
    parts = every.split(degree)
    shared = any(a.kv_stop > b.kv_first for a, b in pairwise(parts))
    levels = [Places.joined(shards[i : i + degree]) for i in range(0, len(shards), degree)]
    sent = []
    for rank in range(len(shards)):
        number, here = divmod(rank, degree)
        own = parts[here]
        _, home = sizes.swap(own, backward, shared)
        total = _ring(needs_of(levels, mask), sizes, own, backward)[number]
        for member in range(degree):
            if member != here:
                out, _ = sizes.swap(parts[member], backward, shared)
                total += shards[rank].seq * out + shards[number * degree + member].seq * home
        sent.append(total)
    return sent
