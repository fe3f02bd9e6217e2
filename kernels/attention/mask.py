"""Which keys a query sees, in closed form from positions, so that any tile of a ring can be served and skipped.

Positions count from 0 inside each document and are global: they do not depend on which rank holds a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """A rule over (query position i, key position j) of one document. Keys of other documents are never seen.

    With i' = i // block and j' = j // block, key j is seen if (not causal or j <= i) and, where there is a window,
    |i' - j'| < window / block, or j < sinks, or stride > 0 and (j' + shift * h) % stride == 0 for key head h.

    Sources: sliding window, Beltagy et al. 2020 (Longformer); sinks, Xiao et al. 2023 (StreamingLLM); strided blocks
    beside a local window and sinks, Lin et al. 2024 (S2-Attention) and Ge et al. 2024 (LongGen).

    Raises:
        ValueError: if the numbers contradict each other.
    """

    causal: bool = True
    window: int = 0
    """Positions that a query sees, its own block's included; 0 for all."""
    sinks: int = 0
    """First positions of a document, seen by all later ones; needs a window."""
    block: int = 1
    """Positions that window, sinks and stride count as one; both lengths are multiples of it."""
    stride: int = 0
    """Every stride-th block is seen by all later ones; 0 for none; needs a window."""
    shift: int = 0
    """Blocks by which the strided ones of a key head are shifted against those of the head before it."""

    def __post_init__(self) -> None:
        low = [name for name in ("window", "sinks", "stride", "shift") if getattr(self, name) < 0]
        if low or self.block < 1:
            raise ValueError(f"mask: {low[0] if low else 'block'} is negative or zero; it counts positions or blocks")
        if self.window % self.block or self.sinks % self.block:
            raise ValueError(
                f"mask: window {self.window} and sinks {self.sinks} must be multiples of block {self.block}"
            )
        if (self.sinks or self.stride) and not (self.window and self.causal):
            raise ValueError("mask: sinks and strided blocks are seen beside a causal window; set window and causal")
        if self.block > 1 and not self.window:
            raise ValueError("mask: block is the unit of window, sinks and stride; set window, or leave block at 1")

    @property
    def reach(self) -> int:
        """The window in blocks; 0 for none."""
        return self.window // self.block


def visible(mask: Mask, queries: Tensor, keys: Tensor, head: int | Tensor = 0) -> Tensor:
    """The rule itself, for integer positions (and key heads) that broadcast against each other: bool."""
    seen = queries >= keys if mask.causal else torch.ones((), dtype=torch.bool, device=keys.device)
    if mask.window:
        block_i, block_j = queries // mask.block, keys // mask.block
        wanted = (block_i - block_j).abs() < mask.reach
        wanted = wanted | (keys < mask.sinks)
        if mask.stride:
            wanted = wanted | ((block_j + mask.shift * head) % mask.stride == 0)
        seen = seen & wanted
    return seen.broadcast_to(torch.broadcast_shapes(seen.shape, queries.shape, keys.shape))
