"""The gate of the feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, in their dtype. Source: Shazeer 2020."""
    return F.silu(gate) * up
