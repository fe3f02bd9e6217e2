"""Boxes, held against the sets of elements that they mean."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.train.checkpoint.boxes import Box, pieces, tiles, whole

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes(draw, shape, spill=0):
    """A box in (or, by `spill`, partly outside of) a shape."""
    starts = [draw(st.integers(-spill, size)) for size in shape]
    sizes = [draw(st.integers(0, max(0, size + spill - start))) for start, size in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@st.composite
def tilings(draw, shape):
    """A partition of a shape into boxes by repeated cuts, in any order."""
    parts = [whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        lower = Box(box.offsets, (*box.sizes[:dim], cut, *box.sizes[dim + 1 :]))
        offsets = (*box.offsets[:dim], box.offsets[dim] + cut, *box.offsets[dim + 1 :])
        parts += [lower, Box(offsets, (*box.sizes[:dim], box.sizes[dim] - cut, *box.sizes[dim + 1 :]))]
    return draw(st.permutations(parts))


def elements(box):
    return set(itertools.product(*(range(start, end) for start, end in zip(box.offsets, box.ends, strict=True))))


@given(st.data())
def test_intersection_is_that_of_the_element_sets(data):
    shape = data.draw(shapes)
    one, other = data.draw(boxes(shape, spill=2)), data.draw(boxes(shape, spill=2))
    both = one.intersection(other)
    assert (elements(both) if both else set()) == elements(one) & elements(other)
    assert both is None or both.volume > 0


@given(st.data())
def test_partitions_tile_and_damaged_ones_do_not(data):
    shape = data.draw(shapes)
    parts = data.draw(tilings(shape))
    assert tiles(shape, parts)
    solid = [box for box in parts if box.volume]
    if solid:
        victim = data.draw(st.sampled_from(solid))
        rest = [box for box in parts if box is not victim]
        assert not tiles(shape, rest)
        assert not tiles(shape, [*parts, victim])
        if shape:
            dim = data.draw(st.integers(0, len(shape) - 1))
            moved = tuple(offset + (d == dim) for d, offset in enumerate(victim.offsets))
            assert not tiles(shape, [*rest, Box(moved, victim.sizes)])


@given(st.data())
@settings(max_examples=300)
def test_tiles_agrees_with_counting(data):
    shape = data.draw(shapes)
    some = data.draw(st.lists(boxes(shape, spill=1), max_size=4))
    counted = [element for box in some for element in elements(box)]
    assert tiles(shape, some) == (sorted(counted) == sorted(elements(whole(shape))))


@given(st.data())
def test_pieces_rebuild_what_is_wanted(data):
    shape = data.draw(shapes)
    tensor = np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    shards = [(tensor[box.slices(whole(shape))], box) for box in data.draw(tilings(shape))]
    wanted = data.draw(boxes(shape))
    found = np.zeros(wanted.sizes, dtype=int)
    parts = list(pieces(wanted, [((stored, box), box) for stored, box in shards]))
    for (stored, box), part in parts:
        found[part.slices(wanted)] = stored[part.slices(box)]
    assert np.array_equal(found, tensor[wanted.slices(whole(shape))])
    assert sum(part.volume for _, part in parts) == wanted.volume


def test_tiles_refuses_boxes_of_another_rank_of_tensor():
    assert not tiles((4,), [Box((0, 0), (2, 2))])


def test_many_shards_are_checked_quickly():
    grid = [Box((4 * i, 4 * j), (4, 4)) for i in range(32) for j in range(32)]
    assert tiles((128, 128), grid)
    assert not tiles((128, 128), [*grid[:-1], Box((0, 0), (4, 4))])
