"""The plan of a run: who holds what, as data that can be printed, compared and saved. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

DEGREES = ("dp", "cp")
"""Fields of a plan whose product is its number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of the mesh axes; their product is the number of ranks."""

    __pydantic_config__ = {"extra": "forbid"}

    dp: int = field(default=1, metadata={"min": 1})
    """Data-parallel degree: groups of ranks, each of which computes its own sequences."""
    cp: int = field(default=1, metadata={"min": 1})
    """Context-parallel degree: ranks that share out the tokens of each sequence. State is sharded over all dp x cp
    ranks as `partition` says."""
    context: Literal["ring", "bidirectional_ring", "token_ring", "ulysses", "all_gather", "hybrid", "auto"] = "auto"
    """How the ranks of a context group exchange keys and values, or queries. auto measures the links when a run starts,
    chooses for each pass, says why, and is replaced by its choice in the run's config."""
    context_backward: Literal[
        "", "ring", "bidirectional_ring", "token_ring", "ulysses", "all_gather", "hybrid", "auto"
    ] = ""
    """The same for the backward pass; empty for the forward pass's own."""
    context_level: int = field(default=0, metadata={"min": 0})
    """Ranks of a fast level, neighbours in a context group, for `hybrid`; 0 for the smallest divisor of cp."""
    placement: Literal["auto", "contiguous", "zigzag", "striped", "document_zigzag", "chunks"] = "auto"
    """Which rank of a context group holds which tokens; auto goes by the mask and the documents of each batch."""

    @property
    def num_ranks(self) -> int:
        return self.dp * self.cp

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        hybrid = "hybrid" in (self.context, self.context_backward)
        if self.context_level and not hybrid:
            yield "context_level", 'is for plan.context = "hybrid"; leave it out'
        elif self.context_level and self.cp % self.context_level:
            yield "context_level", f"is {self.context_level}, which does not divide plan.cp = {self.cp}"

    def __str__(self) -> str:
        if self.cp == 1:
            return f"dp={self.dp}"
        passes = self.context + (f"/{self.context_backward}" if self.context_backward else "")
        return f"dp={self.dp},cp={self.cp},context={passes}"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Over which ranks each kind of state is sharded. Gradients and optimizer state are sharded over all of the data
    plane."""

    __pydantic_config__ = {"extra": "forbid"}

    weights: Literal["all", "rank"] = "all"
    """`all`: each rank holds its shard, and gathers a block for forward and again for backward (ZeRO-3). `rank`: a
    block gathered for forward stays whole until its backward: a third less traffic, more memory (ZeRO-2)."""
