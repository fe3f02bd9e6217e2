"""Micro-batches one after the other through a model whose layers are all on this rank: no pipeline."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from armillary.parallel.runner import Part


class Serial:
    """See `parallel.runner.Runner`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def forward_backward(self, parts: Sequence[Part], divisor: Tensor) -> Tensor:
        total = torch.zeros((), device=divisor.device, dtype=torch.float64)
        for index, part in enumerate(parts):
            self._sync_gradients(index == len(parts) - 1)
            loss = self.loss(part) / divisor
            loss.backward()
            total += loss.detach()
        return total

    def loss(self, part: Part) -> Tensor:
        return self.model(part.tokens, part.places, part.labels)

    def _sync_gradients(self, sync: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(sync)
