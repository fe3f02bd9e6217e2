"""How a parameter is divided over the ranks of a tensor group and the data plane: boxes, as pure numbers.

A cut is the same object on every rank, so each knows who holds what without asking.
"""

import itertools
import math
from dataclasses import dataclass

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangular part of a tensor."""


@dataclass(frozen=True)
class Cut:
    """How the tensor ranks divide one parameter. Ranks with equal parts are replicas: each has the gradient of its own
    tokens or heads only, and the sum over them is the gradient."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int
    """The dim that is divided."""
    parts: tuple[tuple[int, int], ...]
    """First element and size of each tensor rank's part of that dim; a part may be empty."""

    @classmethod
    def whole(cls, shape: tuple[int, ...], degree: int = 1) -> "Cut":
        """Every tensor rank holds everything."""
        return cls(shape, 0, ((0, shape[0]),) * degree)

    @classmethod
    def even(cls, shape: tuple[int, ...], dim: int, degree: int, unit: int = 1) -> "Cut":
        """Parts of `unit` elements or a multiple of it, as equal as can be, in rank order."""
        units, over = divmod(shape[dim], unit)
        assert over == 0, (shape, dim, unit)
        edges = [units * rank // degree * unit for rank in range(degree + 1)]
        return cls(shape, dim, tuple((a, b - a) for a, b in itertools.pairwise(edges)))

    def holders(self, rank: int) -> tuple[int, ...]:
        """The tensor ranks that hold the same part as `rank`, in order; the first of them speaks for all."""
        return tuple(other for other, part in enumerate(self.parts) if part == self.parts[rank])

    def speaks(self, rank: int) -> bool:
        """Whether this tensor rank is the one of its part's holders that counts and saves it."""
        return self.holders(rank)[0] == rank

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Of the part of a tensor rank."""
        return (*self.shape[: self.dim], self.parts[rank][1], *self.shape[self.dim + 1 :])

    def box(self, rank: int) -> Box:
        """Where a tensor rank's part lies in the whole."""
        offsets = [0] * len(self.shape)
        offsets[self.dim] = self.parts[rank][0]
        return tuple(offsets), self.local_shape(rank)

    def shard(self, rank: int, index: int, count: int) -> Box:
        """Where the shard of plane rank `index` of `count` lies: FSDP2 cuts the first dim of a tensor rank's part as
        torch.chunk does, so that the last ranks may hold fewer rows, or none."""
        offsets, sizes = self.box(rank)
        rows = math.ceil(sizes[0] / count)
        first = min(index * rows, sizes[0])
        size = min(rows, sizes[0] - first)
        return (offsets[0] + first, *offsets[1:]), (size, *sizes[1:])
