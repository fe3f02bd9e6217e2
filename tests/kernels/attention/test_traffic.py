"""The meter against the kernels' loops run in plain Python, against the dense formulas, and a worked example."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import grids, masks, sees

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.kernels.attention.traffic import FLOP, KERNELS, ON_CHIP, Sizes, Traffic, meter, traffic

FULL = Mask(causal=False)


@dataclass
class Run:
    tokens: list[int]
    positions: list[int]

    def index(self, position: int) -> int:
        """The first token at `position` or after it."""
        return next((i for i, p in enumerate(self.positions) if p >= position), len(self.tokens))


@dataclass
class Count:
    bytes: int = 0
    flop: int = 0
    tiles: int = 0
    pairs: list[Any] = field(default_factory=list)


def runs_of(places: Places, row: int) -> list[tuple[int, Run]]:
    """Document and run, of one row."""
    positions = places.positions()[row].tolist()
    return [
        (document, Run(list(range(start, start + n)), positions[start : start + n]))
        for at, start, n, _, _, document in places.runs.tolist()
        if at == row
    ]


def cut(run: Run, size: int) -> Iterator[Run]:
    for start in range(0, len(run.tokens), size):
        yield Run(run.tokens[start : start + size], run.positions[start : start + size])


def window(mask: Mask, low: int, high: int, run: Run) -> tuple[int, int, int, int]:
    """begin, full_begin, full_end, end of the window alone, as `kernels/attention/mask.py` states it."""
    if not mask.window:
        return 0, 0, len(run.tokens), len(run.tokens)
    edges = [(p // mask.block + n) * mask.block for n in (1 - mask.reach, mask.reach) for p in (low, high)]
    return run.index(edges[0]), run.index(edges[1]), run.index(edges[2]), run.index(edges[3])


def middle(begin: int, full_begin: int, full_end: int, size: int) -> tuple[int, int]:
    first = begin + math.ceil(max(full_begin - begin, 0) / size) * size
    return first, max(first, first + math.floor((full_end - first) / size) * size)


def key_stretches(mask: Mask, block: Run, run: Run, size: int, head: int) -> Iterator[tuple[int, int]]:
    low, high = block.positions[0], block.positions[-1]
    begin, full_begin, full_end, end = window(mask, low, high, run)
    if mask.causal:
        full_end, end = run.index(low + 1), run.index(high + 1)
    first, last = middle(begin, full_begin, full_end, size)
    yield from ((last, end), (first, last))
    if mask.window:
        yield from ((begin, min(first, end)), (0, min(run.index(mask.sinks), begin)))
    number = mask.sinks // mask.block
    while mask.stride and number * mask.block <= run.positions[-1]:
        if (number + mask.shift * head) % mask.stride == 0:
            yield run.index(number * mask.block), min(run.index((number + 1) * mask.block), begin)
        number += 1


def query_stretches(mask: Mask, block: Run, run: Run, size: int, head: int) -> Iterator[tuple[int, int]]:
    low, high = block.positions[0], block.positions[-1]
    begin, full_begin, full_end, end = window(mask, low, high, run)
    if mask.causal:
        begin, full_begin = run.index(low), run.index(high)
    first, last = middle(begin, full_begin, full_end, size)
    touched = range(low // mask.block, high // mask.block + 1)
    if low < mask.sinks or (mask.stride and any((n + mask.shift * head) % mask.stride == 0 for n in touched)):
        end = len(run.tokens)
    yield from ((begin, min(first, end)), (first, last), (last, end))


def simulate(kernel: str, tile: Tile, sizes: Sizes, queries: int, keys: int) -> Count:
    """Every program's loops: the bytes it asks for, the FLOP it does, the pairs it meets."""
    e, d, count = sizes.element_size, sizes.head_dim, Count()
    by_keys = kernel == "key_gradient"
    ours, theirs, size, step = (tile.queries, tile.keys, queries, keys)
    if by_keys:
        ours, theirs, size, step = theirs, ours, keys, queries
    group = sizes.heads // sizes.kv_heads
    for row, head in ((r, h) for r in range(ours.batch) for h in range(sizes.kv_heads if by_keys else sizes.heads)):
        kv_head = tile.first_head + (head if by_keys else head // group)
        for document, whole in runs_of(ours, row):
            for block in cut(whole, size):
                each = {"forward": 2 * e * d + 4, "query_gradient": 3 * e * d + 8, "key_gradient": 4 * e * d}[kernel]
                count.bytes += each * len(block.tokens)
                for _, run in (found for found in runs_of(theirs, row) if found[0] == document):
                    stretches = (query_stretches if by_keys else key_stretches)(tile.mask, block, run, step, kv_head)
                    for low, high in list(stretches) * (group if by_keys else 1):
                        for start in range(low, high, step):
                            count.bytes += step * (2 * e * d + (8 if by_keys else 0))
                            count.flop += FLOP[kernel] * size * step * d
                            count.tiles += 1
                            here = range(start, min(start + step, high))
                            count.pairs += [
                                (row, head, i, run.tokens[j])
                                for i, p in zip(block.tokens, block.positions, strict=True)
                                for j in here
                                if (sees(tile.mask, run.positions[j], p, kv_head) if by_keys
                                    else sees(tile.mask, p, run.positions[j], kv_head))
                            ]  # fmt: skip
    return count


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tile, Sizes, int, int]:
    batch = draw(st.integers(0, 2))
    ours = Places.of(*draw(grids(batch, 20)))
    theirs = ours if draw(st.booleans()) else Places.of(*draw(grids(batch, 20)))
    kv_heads = draw(st.integers(1, 2))
    sizes = Sizes(
        kv_heads * draw(st.integers(1, 2)), kv_heads, draw(st.sampled_from([8, 20])), draw(st.sampled_from([2, 4]))
    )
    blocks = (draw(st.sampled_from([1, 2, 3, 8, 32])) for _ in range(2))
    return Tile(ours, theirs, draw(masks()), 1.0, draw(st.integers(0, 2))), sizes, *blocks


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(list(FLOP)))
def test_counts_what_the_loops_do(case: Any, kernel: str) -> None:
    tile, sizes, queries, keys = case
    expected = simulate(kernel, tile, sizes, queries, keys)
    got = traffic(kernel, tile, sizes, queries, keys)
    assert (got.bytes, got.flop, got.tiles) == (expected.bytes, expected.flop, expected.tiles)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(list(FLOP)))
def test_the_loops_meet_each_visible_pair_once(case: Any, kernel: str) -> None:
    """That the simulation is one of a right kernel: every pair that is seen, no pair twice."""
    tile, sizes, queries, keys = case
    met = simulate(kernel, tile, sizes, queries, keys).pairs
    group = sizes.heads // sizes.kv_heads
    count = 0
    for row in range(tile.queries.batch):
        for document, ours in runs_of(tile.queries, row):
            for other, theirs in runs_of(tile.keys, row):
                for head in range(sizes.heads if document == other else 0):
                    kv_head = tile.first_head + head // group
                    count += sum(sees(tile.mask, i, j, kv_head) for i in ours.positions for j in theirs.positions)
    assert len(met) == count
    assert len(set(met)) * (group if kernel == "key_gradient" else 1) == count


@settings(max_examples=50, deadline=None)
@given(cases())
def test_bounds_by_counting(case: Any) -> None:
    tile, sizes, queries, keys = case
    memory, d, group = 64, sizes.head_dim, sizes.heads // sizes.kv_heads
    least = schedule = 0.0
    seen_keys = 0
    for row in range(tile.queries.batch):
        for head in range(sizes.kv_heads):
            seen: list[int] = []
            for document, ours in runs_of(tile.queries, row):
                for other, theirs in runs_of(tile.keys, row):
                    if document == other:
                        both = list(zip(theirs.tokens, theirs.positions, strict=True))
                        at = tile.first_head + head
                        seen += [t for i in ours.positions for t, j in both if sees(tile.mask, i, j, at)]
            n = group * tile.queries.seq
            least += max(2 * d * (n + len(set(seen))), group * len(seen) * d * d / memory)
            schedule += 2 * n * d + 2 * len(seen) / max(tile.queries.seq, 1) * d * max(1, 2 * d * n / memory)
            seen_keys += len(set(seen))
    got = traffic("forward", tile, sizes, queries, keys, memory)
    assert got.least == pytest.approx(least)
    assert got.schedule == pytest.approx(schedule)
    rows = tile.queries.batch * tile.queries.seq * sizes.heads
    assert got.compulsory == 2 * sizes.element_size * d * (rows + seen_keys) + 4 * rows


def whole(kernel: str, n: int, s: int, d: int, bm: int, bn: int) -> Traffic:
    tile = Tile(Places.in_order(1, n), Places.in_order(1, s), FULL, 1.0)
    return traffic(kernel, tile, Sizes(1, 1, d), bm, bn)


@pytest.mark.parametrize(("n", "s", "d", "bm", "bn"), [(512, 1024, 64, 64, 128), (1024, 256, 128, 128, 64)])
def test_dense_formulas(n: int, s: int, d: int, bm: int, bn: int) -> None:
    def of(kernel: str) -> int:
        return whole(kernel, n, s, d, bm, bn).bytes

    assert of("forward") == 2 * 2 * n * d + 4 * n + 2 * 2 * s * d * (n // bm)
    assert of("query_gradient") == 3 * 2 * n * d + 8 * n + 2 * 2 * s * d * (n // bm)
    assert of("key_gradient") == 4 * 2 * s * d + (2 * 2 * n * d + 8 * n) * (s // bn)
    assert of("delta") == 2 * 2 * n * d + 4 * n


@pytest.mark.parametrize(
    ("bm", "mebibytes", "intensity", "rho_lb", "rho_sched"),
    [(64, 516, 64, 28.6, 6.8), (128, 260, 126, 14.4, 3.4), (256, 132, 248, 7.3, 1.7)],
)
def test_worked_example(bm: int, mebibytes: int, intensity: int, rho_lb: float, rho_sched: float) -> None:
    """8192 queries and keys, head_dim 128, all seen, on an H100."""
    got = whole("forward", 8192, 8192, 128, bm, 64)
    assert round(got.bytes / 2**20) == mebibytes
    assert round(got.intensity + 1e-9) == intensity
    assert round(got.rho_lb, 1) == rho_lb
    assert round(got.rho_sched, 1) == rho_sched
    assert (got.tiles, ON_CHIP) == (got.all_tiles, 116224)


def test_intensities_of_the_backward() -> None:
    """About twice the keys of a block for dK and dV, one and a half times its queries for dQ."""
    assert whole("key_gradient", 8192, 8192, 128, 64, 128).intensity == pytest.approx(2 * 128, rel=0.05)
    assert whole("query_gradient", 8192, 8192, 128, 128, 64).intensity == pytest.approx(1.5 * 128, rel=0.04)


def test_a_shared_key_head_is_read_once_for_its_group() -> None:
    places = Places.in_order(1, 512)
    tile = Tile(places, places, Mask(), 1.0)
    alone, shared = (traffic("key_gradient", tile, Sizes(4, kv, 64), 64, 64) for kv in (4, 1))
    assert alone.tiles == shared.tiles
    assert alone.bytes - shared.bytes == 3 * 4 * 2 * 512 * 64


def test_heads_that_see_different_blocks_are_counted_apart() -> None:
    places = Places.in_order(1, 100)
    mask = Mask(window=8, block=4, stride=3, shift=1)

    def of(first: int, kv_heads: int) -> Traffic:
        return traffic("forward", Tile(places, places, mask, 1.0, first), Sizes(kv_heads, kv_heads, 8), 8, 8)

    alone = [of(head, 1) for head in range(4)]
    assert alone[0].tiles != alone[1].tiles
    together = of(0, 4)
    for name in ("bytes", "flop", "tiles", "compulsory", "least", "schedule"):
        assert getattr(together, name) == pytest.approx(sum(getattr(one, name) for one in alone))


def test_meter_names_all_kernels_and_refuses_nonsense() -> None:
    places = Places.in_order(2, 16)
    tile, blocks = Tile(places, places, Mask(), 1.0), dict.fromkeys(FLOP, (8, 8))
    assert tuple(each.kernel for each in meter(tile, Sizes(2, 1, 8), blocks)) == KERNELS
    with pytest.raises(ValueError, match="no kernel 'backward'; there are forward, delta"):
        traffic("backward", tile, Sizes(2, 1, 8), 8, 8)
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 key heads"):
        Sizes(3, 2, 64)
