"""Dtypes by the names of `optim.precision`."""

import torch

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""Dtype of forward and backward."""


def weights_dtype(precision: str) -> torch.dtype:
    """Dtype of weights, gradients and optimizer state: float32, or float64 where that is computed in."""
    return torch.float64 if precision == "float64" else torch.float32
