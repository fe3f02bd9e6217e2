"""One rank's rows of an output matrix that is split by vocabulary (vocabulary parallelism)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's rows lie in the whole output matrix, and how its ranks put small tensors together.

    The ranks' shards must cover the vocabulary without gap or overlap; sizes may differ, and a shard may be empty.
    """

    first: int
    """Global id of the shard's row 0."""
    largest: int
    """Rows of the largest shard: the same on all ranks, so that all of them cut the tokens into the same chunks."""
    reduce_max: Callable[[Tensor], Tensor]
    """Elementwise maximum over the ranks, the same bits on all; may work in place."""
    reduce_sum: Callable[[Tensor], Tensor]
    """Elementwise sum over the ranks, the same bits on all; may work in place."""
