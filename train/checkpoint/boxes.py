"""Boxes inside a tensor: whether they tile it, and which of them a wanted box needs.

Pure numbers. A box of a 0-d tensor has no offsets and holds one element.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it begins in each dim, and how many elements it spans there."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last element of each dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def volume(self) -> int:
        """How many elements it holds."""
        return math.prod(self.sizes)

    def intersection(self, other: "Box") -> "Box | None":
        """The elements in both boxes, in the tensor's coordinates; None if there are none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def slices(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies inside an array that holds just `outer`."""
        starts = tuple(offset - origin for offset, origin in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def tiles(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether the boxes hold each element of a tensor of this shape exactly once, and nothing outside of it.

    Boxes without elements count for nothing, so a tensor without elements is tiled by none.
    """
    solid = [box for box in boxes if box.volume]
    if any(len(box.sizes) != len(shape) or len(box.offsets) != len(shape) for box in solid):
        return False
    if sum(box.volume for box in solid) != math.prod(shape):
        return False
    return not solid or _tiles_from(0, shape, solid)


def _tiles_from(dim: int, shape: Sequence[int], boxes: list[Box]) -> bool:
    """`tiles` for the dims from `dim` on: sweeps `dim`, and asks the same of every slab between two cuts."""
    if dim == len(shape):
        return len(boxes) == 1
    spans = sorted(((box.offsets[dim], box.ends[dim], box) for box in boxes), key=lambda span: span[:2], reverse=True)
    cuts = sorted({cut for start, end, _ in spans for cut in (start, end)})
    if not cuts or cuts[0] != 0 or cuts[-1] != shape[dim]:
        return False
    active: list[tuple[int, Box]] = []
    for cut in cuts[:-1]:
        active = [(end, box) for end, box in active if end > cut]
        while spans and spans[-1][0] == cut:
            _, end, box = spans.pop()
            active.append((end, box))
        if not _tiles_from(dim + 1, shape, [box for _, box in active]):
            return False
    return True


def pieces(wanted: Box, shards: Iterable[tuple[T, Box]]) -> Iterator[tuple[T, Box]]:
    """The shards that hold a part of `wanted`, each with that part (in the tensor's coordinates)."""
    for shard, box in shards:
        part = wanted.intersection(box)
        if part is not None:
            yield shard, part
