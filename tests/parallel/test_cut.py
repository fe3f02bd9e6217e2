"""Cuts as pure numbers: parts and shards tile the whole, and one of its holders speaks for each part."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armillary.parallel.cut import Box, Cut


def cover(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many of the boxes hold each element."""
    counts = np.zeros(shape, int)
    for offsets, sizes in boxes:
        counts[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
    return counts


@given(
    units=st.integers(0, 12),
    unit=st.integers(1, 4),
    other=st.integers(1, 3),
    dim=st.integers(0, 1),
    degree=st.integers(1, 6),
)
def test_even_parts_tile_the_whole_and_differ_by_one_unit(units, unit, other, dim, degree):
    shape = (units * unit, other) if dim == 0 else (other, units * unit)
    cut = Cut.even(shape, dim, degree, unit)
    assert (cover(shape, [cut.box(rank) for rank in range(degree)]) == 1).all()
    sizes = [size for _, size in cut.parts]
    assert all(size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= unit
    assert [cut.local_shape(rank) for rank in range(degree)] == [cut.box(rank)[1] for rank in range(degree)]


@given(
    rows=st.integers(1, 13),
    dim=st.integers(0, 1),
    degree=st.integers(1, 4),
    count=st.integers(1, 5),
    replicated=st.booleans(),
)
def test_the_shards_of_those_who_speak_tile_the_whole(rows, dim, degree, count, replicated):
    shape = (rows, 3) if dim == 0 else (3, rows)
    cut = Cut.whole(shape, degree) if replicated else Cut.even(shape, dim, degree)
    speakers = [rank for rank in range(degree) if cut.speaks(rank) and math.prod(cut.local_shape(rank))]
    boxes = [cut.shard(rank, index, count) for rank in speakers for index in range(count)]
    assert (cover(shape, boxes) == 1).all()


@given(rows=st.integers(0, 9), count=st.integers(1, 5))
def test_shards_are_those_of_torch_chunk(rows, count):
    import torch

    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(count)] if rows else []
    shards = [Cut.whole((rows,)).shard(0, index, count)[1][0] for index in range(count)]
    assert [size for size in shards if size] == chunks


def test_holders_are_the_ranks_with_the_same_part():
    cut = Cut((4, 2), 0, ((0, 2), (0, 2), (2, 2), (2, 2), (2, 2)))
    assert [cut.holders(rank) for rank in range(5)] == [(0, 1), (0, 1), (2, 3, 4), (2, 3, 4), (2, 3, 4)]
    assert [cut.speaks(rank) for rank in range(5)] == [True, False, True, False, False]
