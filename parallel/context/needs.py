"""Which tokens of one rank another needs: from the places of all ranks and the mask, without a process.

Every rank computes the same table, so that what a mask makes empty is neither sent, nor waited for, nor computed.
Tensors hold the same tokens of every row, so a token is needed where any row needs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import block_table, key_ranges, query_ranges, run_table


@dataclass(frozen=True)
class Needs:
    """For each pair of ranks, which tokens have to do with each other."""

    keys: tuple[tuple[np.ndarray, ...], ...]
    """`keys[q][k]`, bool (tokens of k): the keys of rank k that some query of rank q sees."""
    queries: tuple[tuple[np.ndarray, ...], ...]
    """`queries[q][k]`, bool (tokens of q): the queries of rank q that see some key of rank k."""


def needs_of(shards: Sequence[Places], mask: Mask) -> Needs:
    """The table for ranks that hold `shards`, kept with the first of them."""

    def make() -> Needs:
        whole = Places.joined(shards)
        cuts = np.cumsum([places.seq for places in shards])[:-1]
        keys = [np.split(seen_keys(places, whole, mask), cuts) for places in shards]
        queries = [np.split(seeing_queries(whole, places, mask), cuts) for places in shards]
        return Needs(tuple(map(tuple, keys)), tuple(zip(*queries, strict=True)))

    return shards[0].derived(("needs", tuple(places.key for places in shards), mask), make)


def seen_keys(queries: Places, keys: Places, mask: Mask) -> np.ndarray:
    """Which keys some query sees, in some row and some head: bool (keys.seq,).

    Never too few; too many only between the queries of a run whose steps are longer than the window.
    """
    return _marked(queries, keys, mask, key_ranges, partial(_far_keys, _for_all_heads(mask)))


def seeing_queries(queries: Places, keys: Places, mask: Mask) -> np.ndarray:
    """Which queries see some key, in some row and some head: bool (queries.seq,). Never too few."""
    return _marked(keys, queries, mask, query_ranges, lambda positions, begin, end: np.arange(len(positions)) >= end)


def _for_all_heads(mask: Mask) -> Mask:
    """A mask that shows what any head sees: strided blocks that differ from head to head are all blocks."""
    return replace(mask, stride=1, shift=0) if mask.stride and mask.shift else mask


def _marked(ours: Places, theirs: Places, mask: Mask, ranges_of: Callable, far: Callable) -> np.ndarray:
    """Tokens of `theirs` that have to do with a run of `ours`."""
    blocks, runs = block_table(ours, theirs, max(ours.seq, 1)), run_table(theirs).astype(np.int64)
    ranges = ranges_of(_for_all_heads(mask), blocks, runs)
    start = runs[ranges.run, 0]
    edges = np.zeros(theirs.seq + 1, dtype=np.int64)
    np.add.at(edges, start + ranges.begin, 1)
    np.add.at(edges, start + np.maximum(ranges.begin, ranges.end), -1)
    marked = np.cumsum(edges)[: theirs.seq] > 0
    for pair in np.flatnonzero(ranges.far > 0).tolist():
        first, length, position, step = runs[ranges.run[pair]].tolist()
        positions = position + step * np.arange(length)
        marked[first : first + length] |= far(positions, int(ranges.begin[pair]), int(ranges.end[pair]))
    return marked


def _far_keys(mask: Mask, positions: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Sinks and keys in strided blocks, before the window."""
    far = positions < mask.sinks
    if mask.stride:
        far |= positions // mask.block % mask.stride == 0
    return far & (np.arange(len(positions)) < begin)
