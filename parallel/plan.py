"""The plan of a run: who holds what, as data that can be printed, compared and saved. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

DEGREES = ("pp", "dp", "cp", "tp")
"""Fields of a plan whose product is its number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of the mesh axes; their product is the number of ranks."""

    __pydantic_config__ = {"extra": "forbid"}

    pp: int = field(default=1, metadata={"min": 1})
    """Pipeline-parallel degree: ranks that hold the layers one after the other, and pass micro-batches on."""
    dp: int = field(default=1, metadata={"min": 1})
    """Data-parallel degree: groups of ranks, each of which computes its own sequences."""
    cp: int = field(default=1, metadata={"min": 1})
    """Context-parallel degree: ranks that share out the tokens of each sequence. State is sharded over all dp x cp
    ranks as `partition` says."""
    tp: int = field(default=1, metadata={"min": 1})
    """Tensor-parallel degree: ranks that share out the heads, the hidden channels and the vocabulary of each layer, and
    between layers the tokens (sequence parallelism)."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "synthesised"] = "1f1b"
    """In which order the stages of a pipeline compute. synthesised: found for the measured times of this run's stages
    when it starts, never worse than the others in the simulator."""
    stages_per_rank: int = field(default=0, metadata={"min": 0})
    """Stages of each pipeline rank; 0 for the schedule's own: 2 for interleaved, zbv and dualpipev, 1 for others."""
    in_flight: int = field(default=0, metadata={"min": 0})
    """Most micro-batches whose activations a stage of a synthesised schedule may hold; 0 for plan.pp, as 1f1b does."""
    layers: tuple[int, ...] = ()
    """Layers of each stage of the pipeline, from the first on; empty: split so that the costliest rank has least."""
    split: Literal["cost", "measured"] = "cost"
    """What an automatic split goes by: the layers' operations, or those and the speed of each pipeline rank, measured
    when the run starts."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What of the forward pass is computed again for backward instead of being kept: nothing; the feed-forward half of
    each block (most of the memory, none of the attention and its communication); all but each block's input."""
    compile: bool = False
    """torch.compile, block by block."""
    verify: Literal["", "first-step"] = ""
    """first-step: before a run trains, also where it resumes, its ranks compute two steps of a small model of the same
    kind in float64, under the plan and on one process; the run is refused where loss, gradients or weights differ."""
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
        return self.pp * self.dp * self.cp * self.tp

    @property
    def per_rank(self) -> int:
        """Stages that each pipeline rank holds."""
        return self.stages_per_rank or (2 if self.schedule in ("interleaved", "zbv", "dualpipev") else 1)

    @property
    def num_stages(self) -> int:
        return self.pp * self.per_rank if self.pp > 1 else 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        if self.schedule in ("zbv", "dualpipev") and self.per_rank != 2:
            yield "stages_per_rank", f"is {self.per_rank}; {self.schedule} runs down and up a V: leave it out, or set 2"
        if self.schedule in ("gpipe", "1f1b") and self.per_rank != 1:
            yield "stages_per_rank", f"is {self.per_rank}; {self.schedule} has one stage a rank: take interleaved"
        if self.layers and len(self.layers) != self.num_stages:
            yield "layers", f"names {len(self.layers)} stages, but the pipeline has {self.num_stages}"
        hybrid = "hybrid" in (self.context, self.context_backward)
        if self.context_level and not hybrid:
            yield "context_level", 'is for plan.context = "hybrid"; leave it out'
        elif self.context_level and self.cp % self.context_level:
            yield "context_level", f"is {self.context_level}, which does not divide plan.cp = {self.cp}"

    def __str__(self) -> str:
        parts = [f"{axis}={getattr(self, axis)}" for axis in DEGREES if axis == "dp" or getattr(self, axis) > 1]
        if self.cp > 1:
            parts.append(f"context={self.context}" + (f"/{self.context_backward}" if self.context_backward else ""))
        if self.pp > 1:
            parts.append(f"schedule={self.schedule}")
        if self.recompute != "none":
            parts.append(f"recompute={self.recompute}")
        return ",".join(parts + (["compile"] if self.compile else []))


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Over which ranks each kind of state is sharded. Gradients and optimizer state are sharded over all of the data
    plane."""

    __pydantic_config__ = {"extra": "forbid"}

    weights: Literal["all", "rank"] = "all"
    """`all`: each rank holds its shard, and gathers a block for forward and again for backward (ZeRO-3). `rank`: a
    block gathered for forward stays whole until its backward: a third less traffic, more memory (ZeRO-2)."""
