"""The plan of a run: who holds what, as data that can be printed, compared and saved. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of the mesh axes; their product is the number of ranks."""

    __pydantic_config__ = {"extra": "forbid"}

    dp: int = field(default=1, metadata={"min": 1})
    """Data-parallel degree: ranks each of which computes its own sequences, and among which the state is sharded as
    `partition` says."""

    @property
    def num_ranks(self) -> int:
        return self.dp

    def __str__(self) -> str:
        return f"dp={self.dp}"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Over which ranks each kind of state is sharded. Gradients and optimizer state are sharded over all of the data
    plane."""

    __pydantic_config__ = {"extra": "forbid"}

    weights: Literal["all", "rank"] = "all"
    """`all`: each rank holds its shard, and gathers a block for forward and again for backward (ZeRO-3). `rank`: a
    block gathered for forward stays whole until its backward: a third less traffic, more memory (ZeRO-2)."""
