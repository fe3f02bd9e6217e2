"""What a rank computes at once: its part of one micro-batch."""

from dataclasses import dataclass

from torch import Tensor

from armillary.kernels.attention.places import Places


@dataclass(frozen=True)
class Part:
    """Tokens and labels (batch, seq) int64 on the rank's device, and where they stand."""

    tokens: Tensor
    labels: Tensor
    places: Places
