"""Micro-batches one after the other through a model whose layers are all on this rank: no pipeline."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from armillary.parallel.part import Part


class Serial:
    """Runs forward and backward of a step's micro-batches. `parallel/pipeline/runner.py` has the other way to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def forward_backward(self, parts: Sequence[Part], divisor: Tensor) -> Tensor:
        """Adds the gradient of the loss over `divisor` to every parameter.

        Args:
            parts: this rank's part of each micro-batch.
            divisor: 0-d; what the sum over labelled tokens is divided by, before backward.

        Returns:
            This rank's part of the loss, 0-d float64.
        """
        total = torch.zeros((), device=divisor.device, dtype=torch.float64)
        for index, part in enumerate(parts):
            self._sync_gradients(index == len(parts) - 1)
            loss = self.loss(part) / divisor
            loss.backward()
            total += loss.detach()
        return total

    def loss(self, part: Part) -> Tensor:
        """The sum over labelled tokens, 0-d."""
        return self.model(part.tokens, part.places, part.labels)

    def _sync_gradients(self, sync: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(sync)
