"""The I/O meter: what an attention call moves between L2 and the processors, and how far that is from the least.

The kernels stream tiles past a block that they hold: bytes follow from how many tiles they visit, and that is counted
from the same tables and closed forms as the kernels' own loops. A visited tile counts whole, its ragged end too, since
a tile is what one load asks for; nothing is approximated but the caches, of which the meter knows none. With `e` bytes
an element and the tiles cut as the kernels cut them, a block of `Bm` queries by `Bn` keys:

    forward         queries, out: 2 e d a query; lse: 4        keys, values: 2 e d Bn a tile             4 Bm Bn d FLOP
    query_gradient  q, d_out, dq: 3 e d; lse, delta: 8         keys, values: 2 e d Bn a tile             6 Bm Bn d
    key_gradient    k, v, dk, dv: 4 e d a key                  q, d_out, lse, delta: (2 e d + 8) Bm      8 Bm Bn d
    delta           out, d_out: 2 e d a query; delta: 4        -                                         2 d a query

Sources: Dao et al. 2022 (FlashAttention); Saha and Ye 2024 (lower bound of its I/O).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.tiles import Ranges, Tile, block_table, key_ranges, query_ranges, run_table

ON_CHIP = 227 * 1024 // 2
"""Elements of 16 bits in the shared memory that one program of an H100 can have."""
FLOP = {"forward": 4, "query_gradient": 6, "key_gradient": 8}
"""Of each pair of a query and a key in a visited tile, for each channel."""
KERNELS = ("forward", "delta", "key_gradient", "query_gradient")


@dataclass(frozen=True)
class Sizes:
    """What of a call's tensors places and mask do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    element_size: int = 2
    """Bytes of an element of q, k, v, out and their gradients; lse and delta have 4."""

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.element_size) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"traffic: {self.heads} heads are not a multiple of {self.kv_heads} key heads, each 1 or more"
            )


@dataclass(frozen=True)
class Traffic:
    """What one kernel does in one call, all rows and heads together."""

    kernel: str
    bytes: int
    """Between L2 and the processors."""
    flop: int
    """Executed, in whole tiles; not what is masked out of them."""
    tiles: int
    """Visited."""
    all_tiles: int
    """As many as a dense grid has."""
    compulsory: int
    """Bytes that must come from or go to DRAM once, whatever the schedule; keys that nobody sees not counted."""
    least: float = 0.0
    """Elements of the lower bound, whose constant is unknown; 0 where there is none: it is proved for the forward."""
    schedule: float = 0.0
    """Elements of the best schedule that holds queries and out on the chip and streams keys; 0 where there is none."""
    element_size: int = 2

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flop / self.bytes if self.bytes else 0.0

    @property
    def rho_lb(self) -> float:
        """Elements moved by the lower bound's: compares configurations, and is no share of an optimum."""
        return self.bytes / self.element_size / self.least if self.least else 0.0

    @property
    def rho_sched(self) -> float:
        """Elements moved by the best query-stationary schedule's."""
        return self.bytes / self.element_size / self.schedule if self.schedule else 0.0


def meter(
    tile: Tile, sizes: Sizes, blocks: Mapping[str, tuple[int, int]], memory: int = ON_CHIP
) -> tuple[Traffic, ...]:
    """The traffic of each kernel of KERNELS.

    Args:
        tile: which tokens ask and answer, and by which mask.
        sizes: heads, channels and bytes.
        blocks: for each kernel of FLOP, queries and keys a tile.
        memory: elements that fit on the chip, for the two ratios.
    """
    return tuple(traffic(kernel, tile, sizes, *blocks.get(kernel, (1, 1)), memory=memory) for kernel in KERNELS)


def traffic(kernel: str, tile: Tile, sizes: Sizes, queries: int, keys: int, memory: int = ON_CHIP) -> Traffic:
    """What `kernel` moves with tiles of `queries` by `keys`.

    Raises:
        ValueError: if there is no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"traffic: there is no kernel {kernel!r}; there are {', '.join(KERNELS)}")
    e, d, batch = sizes.element_size, sizes.head_dim, tile.queries.batch
    all_queries, all_keys = batch * tile.queries.seq * sizes.heads, batch * tile.keys.seq * sizes.kv_heads
    seen, least, schedule = _bounds(tile, sizes, memory)
    if kernel == "delta":
        moved = (2 * e * d + 4) * all_queries
        return Traffic("delta", moved, 2 * d * all_queries, 0, 0, moved, element_size=e)
    visits = {"forward": key_visits, "query_gradient": key_visits, "key_gradient": query_visits}[kernel]
    counts = _per_head(tile.mask, sizes, lambda head: int(visits(tile, queries, keys, head).sum()))
    tiles = sum(counts) * (sizes.heads // sizes.kv_heads)
    if kernel == "forward":
        held = compulsory = (2 * e * d + 4) * all_queries
        streamed, compulsory = 2 * e * d * keys, compulsory + 2 * e * d * seen
    elif kernel == "query_gradient":
        held = compulsory = (3 * e * d + 8) * all_queries
        streamed, compulsory = 2 * e * d * keys, compulsory + 2 * e * d * seen
    else:
        held, streamed = 4 * e * d * all_keys, (2 * e * d + 8) * queries
        compulsory = 2 * e * d * (all_keys + seen) + (2 * e * d + 8) * all_queries
    grid = batch * sizes.heads * -(-tile.queries.seq // queries) * -(-tile.keys.seq // keys)
    return Traffic(
        kernel,
        bytes=held + streamed * tiles,
        flop=FLOP[kernel] * queries * keys * d * tiles,
        tiles=tiles,
        all_tiles=grid,
        compulsory=compulsory,
        least=least if kernel == "forward" else 0.0,
        schedule=schedule if kernel == "forward" else 0.0,
        element_size=e,
    )


def key_visits(tile: Tile, queries: int, keys: int, head: int = 0) -> np.ndarray:
    """Tiles that the forward and dQ kernels visit for one query head of key head `head`: (pairs of block and run,)."""
    mask, head = tile.mask, tile.first_head + head
    blocks, runs = block_table(tile.queries, tile.keys, queries), run_table(tile.keys)
    at = key_ranges(mask, blocks, runs, head)
    first, last = _middle(at, keys)
    tiles = (last - first) // keys + _tiles(at.end - last, keys)
    if mask.window:
        tiles = tiles + _tiles(np.minimum(first, at.end) - at.begin, keys)
        for low, high in _far(mask, at, runs, head):
            tiles = tiles + _tiles(high - low, keys)
    return tiles


def query_visits(tile: Tile, queries: int, keys: int, head: int = 0) -> np.ndarray:
    """Tiles that the dK/dV kernel visits for one query head of key head `head`: (pairs of block and run,)."""
    blocks, runs = block_table(tile.keys, tile.queries, keys), run_table(tile.queries)
    at = query_ranges(tile.mask, blocks, runs, tile.first_head + head)
    first, last = _middle(at, queries)
    end = at.end + at.far
    return (last - first) // queries + _tiles(np.minimum(first, end) - at.begin, queries) + _tiles(end - last, queries)


def _middle(at: Ranges, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole tiles that need no mask, from where to where; the edges beside them are masked."""
    first = at.begin + _tiles(at.full_begin - at.begin, size) * size
    return first, first + np.maximum(at.full_end - first, 0) // size * size


def _tiles(length: np.ndarray, size: int) -> np.ndarray:
    return -(-np.maximum(length, 0) // size)


def _far(mask: Mask, at: Ranges, runs: np.ndarray, head: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens low .. high of the sinks, and of each strided block after them and before `begin`."""
    _, length, position, step = runs.astype(np.int64)[at.run].T

    def index(bound: int) -> np.ndarray:
        return np.clip(-((position - bound) // step), 0, length)

    yield np.zeros_like(length), np.minimum(index(mask.sinks), at.begin)
    if mask.stride:
        edge = int(np.max(position + at.begin * step, initial=0))
        first = mask.sinks // mask.block
        first += (-(first + mask.shift * head)) % mask.stride
        for start in range(first * mask.block, edge, mask.stride * mask.block):
            yield index(start), np.minimum(index(start + mask.block), at.begin)


def _bounds(tile: Tile, sizes: Sizes, memory: int) -> tuple[int, float, float]:
    """Keys that some query sees, of all rows and key heads; elements of the lower bound, and of the best schedule.

    Both per row and key head, whose `G` query heads count as G times the queries N. With S keys seen, and P of the N by
    S' pairs visible: max(2 G N d + 2 S d, G P d^2 / M), and 2 G N d + 2 (P / N) d max(1, 2 d G N / M).
    """
    d, group, rows = sizes.head_dim, sizes.heads // sizes.kv_heads, tile.queries.batch
    queries = group * tile.queries.seq

    def of_head(head: int) -> tuple[int, float, float]:
        # Of single keys, the ranges are exact.
        keys = block_table(tile.keys, tile.queries, 1)
        at = query_ranges(tile.mask, keys, run_table(tile.queries), tile.first_head + head)
        seen_by = np.zeros(len(keys), np.int64)
        np.add.at(seen_by, at.block, np.maximum(at.end - at.begin, 0) + at.far)
        pairs = np.zeros(rows, np.int64)
        np.add.at(pairs, keys[:, 0], seen_by)
        seen = np.bincount(keys[seen_by > 0, 0], minlength=rows)
        least = np.maximum(2 * d * (queries + seen), group * pairs * d * d / memory)
        passes = 2 * d * (pairs / max(tile.queries.seq, 1)) * max(1, 2 * d * queries / memory)
        return int(seen.sum()), float(least.sum()), float((2 * d * queries + passes).sum())

    def make() -> tuple[int, float, float]:
        seen, least, schedule = zip(*_per_head(tile.mask, sizes, of_head), strict=True)
        return sum(seen), sum(least), sum(schedule)

    return tile.queries.derived(("bounds", tile.keys.key, tile.mask, tile.first_head, sizes, memory), make)


def _per_head(mask: Mask, sizes: Sizes, count: Callable[[int], Any]) -> list[Any]:
    """`count(head)` of each key head; made once for heads that see the same."""
    phases = [mask.shift * head % mask.stride if mask.stride else 0 for head in range(sizes.kv_heads)]
    known = {phase: count(phases.index(phase)) for phase in set(phases)}
    return [known[phase] for phase in phases]
