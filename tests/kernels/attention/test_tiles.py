"""Tables of tiles against the mask itself: nothing that is seen is left out, nothing that is whole is not."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import grids, masks, sees

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import (
    Ranges,
    Tile,
    block_table,
    key_ranges,
    key_tables,
    query_ranges,
    query_tables,
    run_order,
    run_table,
    work_order,
)

SIZES = st.sampled_from([1, 2, 3, 5, 8, 64])


@st.composite
def sides(draw: st.DrawFn) -> tuple[Places, Places]:
    """Queries and keys of the same rows: the same tokens, or others, or none."""
    batch = draw(st.integers(0, 2))
    ours = Places.of(*draw(grids(batch)))
    return ours, ours if draw(st.booleans()) else Places.of(*draw(grids(batch)))


@settings(max_examples=150, deadline=None)
@given(sides(), SIZES)
def test_blocks_hold_each_token_once(pair: tuple[Places, Places], size: int) -> None:
    ours, theirs = pair
    table = block_table(ours, theirs, size)
    assert table.dtype == np.int32
    positions = ours.positions().numpy()
    held = []
    for row, start, count, position, step, *_ in table.tolist():
        assert 1 <= count <= size
        held += [(row, token) for token in range(start, start + count)]
        assert positions[row, start : start + count].tolist() == [position + i * step for i in range(count)]
    assert sorted(held) == [(row, token) for row in range(ours.batch) for token in range(ours.seq)]


@settings(max_examples=150, deadline=None)
@given(sides(), SIZES)
def test_blocks_list_the_runs_of_their_row_and_document(pair: tuple[Places, Places], size: int) -> None:
    ours, theirs = pair
    runs = theirs.runs[run_order(theirs)]
    assert np.array_equal(run_table(theirs), runs[:, 1:5])
    documents = ours.documents().numpy()
    for row, start, _, _, _, first, last, _ in block_table(ours, theirs, size).tolist():
        alike = (runs[:, 0] == row) & (runs[:, 5] == documents[row, start])
        assert np.flatnonzero(alike).tolist() == list(range(first, last))


def pairs_of(
    ours: Places, theirs: Places, size: int, find: Any, mask: Mask, head: int
) -> list[tuple[dict[str, int], list[int], int, list[int], int]]:
    """Each pair's ranges, positions and step of its block, positions and step of its run."""
    blocks, runs = block_table(ours, theirs, size), run_table(theirs)
    ranges: Ranges = find(mask, blocks, runs, head)
    found = []
    for i in range(len(ranges.block)):
        numbers = {name: int(getattr(ranges, name)[i]) for name in ("begin", "full_begin", "full_end", "end", "far")}
        _, _, count, first, step, from_run, to_run, _ = blocks[ranges.block[i]].tolist()
        assert from_run <= ranges.run[i] < to_run
        _, length, begin, stride = runs[ranges.run[i]].tolist()
        found.append(
            (
                numbers,
                [first + k * step for k in range(count)],
                step,
                [begin + k * stride for k in range(length)],
                stride,
            )
        )
    assert len(found) == int((blocks[:, 6] - blocks[:, 5]).sum())
    return found


@settings(max_examples=300, deadline=None)
@given(sides(), SIZES, masks(), st.integers(0, 3))
def test_what_blocks_of_queries_see(pair: tuple[Places, Places], size: int, mask: Mask, head: int) -> None:
    for at, queries, step, keys, stride in pairs_of(*pair, size, key_ranges, mask, head):
        shown = table_of(mask, queries, keys, head)
        check_full(at, shown, len(keys))
        begin, end = at["begin"], max(at["begin"], at["end"])
        assert not shown[:, end:].any()
        # What is seen before `begin` is counted, and seen by every query.
        before = shown[:, :begin]
        assert before.any(0).sum() == before.all(0).sum() == at["far"]
        check_near(at, table_of(window_of(mask), queries, keys), step == stride == 1)


@settings(max_examples=300, deadline=None)
@given(sides(), SIZES, masks(), st.integers(0, 3))
def test_what_sees_blocks_of_keys(pair: tuple[Places, Places], size: int, mask: Mask, head: int) -> None:
    for at, keys, step, queries, stride in pairs_of(*pair, size, query_ranges, mask, head):
        shown = table_of(mask, queries, keys, head).T
        check_full(at, shown, len(queries))
        begin, end = at["begin"], max(at["begin"], at["end"])
        assert not shown[:, :begin].any()
        if at["far"]:
            assert at["far"] == len(queries) - at["end"]
            assert step > 1 or shown[:, end:].any(0).all()
        else:
            assert not shown[:, end:].any()
        check_near(at, table_of(window_of(mask), queries, keys).T, step == stride == 1)


def table_of(mask: Mask, queries: list[int], keys: list[int], head: int = 0) -> np.ndarray:
    return np.array([[sees(mask, i, j, head) for j in keys] for i in queries])


def window_of(mask: Mask) -> Mask:
    return replace(mask, sinks=0, stride=0)


def check_full(at: dict[str, int], shown: np.ndarray, length: int) -> None:
    assert all(0 <= at[name] <= length for name in ("begin", "full_begin", "full_end", "end"))
    assert at["begin"] <= at["full_begin"]
    assert at["full_end"] <= at["end"]
    assert shown[:, at["full_begin"] : at["full_end"]].all()


def check_near(at: dict[str, int], near: np.ndarray, unit_steps: bool) -> None:
    """Without sinks and strided blocks the ranges are what some, and what all, rows of the block see: no more."""
    full = np.flatnonzero(near.all(0)).tolist()
    assert full == list(range(at["full_begin"], at["full_end"]))
    if unit_steps:
        assert np.flatnonzero(near.any(0)).tolist() == list(range(at["begin"], at["end"]))


@settings(max_examples=200, deadline=None)
@given(sides(), SIZES, masks(), st.booleans())
def test_work_is_sorted_and_ties_keep_their_order(pair: Any, size: int, mask: Mask, by_queries: bool) -> None:
    blocks, runs = block_table(*pair, size), run_table(pair[1])
    ranges = (key_ranges if by_queries else query_ranges)(mask, blocks, runs)
    order = work_order(blocks, ranges)
    work = np.zeros(len(blocks), dtype=np.int64)
    np.add.at(work, ranges.block, np.maximum(ranges.end - ranges.begin, 0) + ranges.far)
    assert sorted(range(len(blocks)), key=lambda block: -work[block]) == order.tolist()


@settings(max_examples=50, deadline=None)
@given(sides(), SIZES, masks())
def test_tables_on_a_device_are_made_once(pair: tuple[Places, Places], size: int, mask: Mask) -> None:
    tile, cpu = Tile(*pair, mask, 1.0), torch.device("cpu")
    for find, ours, theirs in ((query_tables, *pair), (key_tables, *reversed(pair))):
        tables = find(tile, size, cpu)
        assert tables is find(Tile(*pair, mask, 2.0), size, cpu)
        assert tables.blocks.dtype == tables.runs.dtype == torch.int32
        assert tables.blocks.is_contiguous()
        assert tables.runs.is_contiguous()
        assert sorted(tables.blocks.tolist()) == sorted(block_table(ours, theirs, size).tolist())
        assert tables.runs.tolist() == run_table(theirs).tolist()
        # Kept for these two: the same rows meet other ones in the next step of a ring.
        other = Places.in_order(theirs.batch, theirs.seq + 1)
        met = Tile(ours, other, mask, 1.0) if find is query_tables else Tile(other, ours, mask, 1.0)
        assert find(met, size, cpu).runs.tolist() == run_table(other).tolist()


def test_strided_blocks_differ_from_head_to_head() -> None:
    places = Places.in_order(1, 64)
    mask = Mask(window=8, block=4, stride=4, shift=1)
    blocks, runs = block_table(places, places, 8), run_table(places)
    counts = [key_ranges(mask, blocks, runs, head).far.tolist() for head in range(4)]
    assert counts[0] == [0, 4, 4, 8, 8, 12, 12, 16]
    assert counts[1] == [0, 0, 0, 4, 4, 8, 8, 12]
    assert counts[2] == counts[3] == [0, 0, 4, 4, 8, 8, 12, 12]
