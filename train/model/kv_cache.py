"""A model that remembers the keys and values of what it has read, so that a new token costs one token's work.

The memory lies behind the seam `core`: the model's blocks are the ordinary ones and know nothing of it.
Shapes: tokens (batch, new); keys and values (batch, seq, kv_heads, head_dim).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from armillary.kernels.attention.call import attention
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.train.model.transformer import Transformer

in_order = lru_cache(maxsize=4)(Places.in_order)
"""One object for all layers, since what is derived from places is kept in them."""


class RememberingCore(nn.Module):
    """Takes the place of `train.model.transformer.Core`: attends to the keys given and to all that were given before.

    Each row is one document, in order. Keys that a window has left behind are dropped now and then.
    """

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        assert mask.causal, "what was read before must not depend on what comes"
        assert not mask.sinks, "sinks would have to be kept for ever"
        assert not mask.stride, "strided blocks would have to be kept for ever"
        self.mask = mask
        self.past: Tensor | None = None
        self.held = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        batch, new = k.shape[:2]
        past = self._with_room_for(k)
        past[0, :, self.held : self.held + new] = k
        past[1, :, self.held : self.held + new] = v
        self.held += new
        end = int(places.runs[0, 3]) + new  # one more than the last position
        seen = min(self.held, self.mask.window + new - 1) if self.mask.window else self.held
        keys, values = past[:, :, self.held - seen : self.held]
        return attention(q, keys, values, places, in_order(batch, seen, end - seen), mask=self.mask).out

    def _with_room_for(self, k: Tensor) -> Tensor:
        """The memory (keys and values, batch, seq, kv_heads, head_dim), moved to a larger one where it would not do."""
        past, new = self.past, k.shape[1]
        if past is None or past.shape[2] < self.held + new:
            # What no later query sees is left behind.
            kept = min(self.held, self.mask.window - 1) if self.mask.window else self.held
            larger = k.new_empty(2, k.shape[0], 2 * (kept + new), *k.shape[2:])
            if past is not None:
                larger[:, :, :kept] = past[:, :, self.held - kept : self.held]
            self.past, self.held = past, kept = larger, kept
        return past


class LastToken(nn.Module):
    """Takes the place of a model's head, for the last token of each row alone."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.head(x[:, -1:], *rest)


class Memory:
    """What a model has read so far, one document a row; made by `remembering`."""

    def __init__(self, model: Transformer, cores: list[RememberingCore]) -> None:
        self._model, self._cores = model, cores
        self.length = 0
        """Tokens read: the position of the next."""

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits (batch, new, vocab) at the new tokens, which follow those read before."""
        batch, new = tokens.shape
        places = Places.in_order(batch, new, self.length)
        self.length += new
        return self._model(tokens, places)

    def forget(self) -> None:
        """Begins anew, at position 0."""
        self.length = 0
        for core in self._cores:
            core.past, core.held = None, 0


@contextmanager
def remembering(model: Transformer, last_only: bool = False) -> Iterator[Memory]:
    """Gives the model a memory, and takes it away at the end.

    Args:
        model: whole, on one process.
        last_only: whether only the last new token's logits are computed, (batch, 1, vocab).
    """
    attentions: list[Any] = [block.attention for block in model.blocks.values()]
    before, head = [part.core for part in attentions], model.head
    cores = [RememberingCore(core.mask) for core in before]
    try:
        for part, core in zip(attentions, cores, strict=True):
            part.core = core
        if last_only:
            model.head = LastToken(head)
        yield Memory(model, cores)
    finally:
        for part, core in zip(attentions, before, strict=True):
            part.core = core
        model.head = head
