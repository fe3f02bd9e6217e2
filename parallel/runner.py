"""What a rank computes at once, and the shape of what computes it: `Serial`, `Pipeline`, DeepSpeed's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from armillary.kernels.attention.places import Places


@dataclass(frozen=True)
class Part:
    """Tokens and labels (batch, seq) int64 on the rank's device, and where they stand."""

    tokens: Tensor
    labels: Tensor
    places: Places


class Runner(Protocol):
    """Takes a step's micro-batches through this rank's layers."""

    def forward_backward(self, parts: Sequence[Part], divisor: Tensor) -> Tensor:
        """Adds the gradient of the loss over `divisor` to every parameter.

        Args:
            parts: this rank's part of each micro-batch.
            divisor: 0-d; what the sum over labelled tokens is divided by, before backward.

        Returns:
            This rank's part of the loss, 0-d float64.
        """
        ...

    def loss(self, part: Part) -> Tensor:
        """The sum over labelled tokens, 0-d; forward only."""
        ...
