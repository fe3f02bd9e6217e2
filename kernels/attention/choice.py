"""Which implementation computes an attention call: a table, printed by `armillary bench attention --choices`."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from armillary.kernels.attention.configs import longest
from armillary.kernels.select import VARIABLE, has_triton, overrides

IMPLEMENTATIONS = {
    "triton": "armillary.kernels.attention.flash_triton",
    "cpu": "armillary.kernels.attention.cpu",
    "reference": "armillary.kernels.attention.reference",
}
"""Each module has `forward(q, k, v, tile, out, lse, fold)` and `backward(d_out, q, k, v, lse, delta, tile, gradients,
add)`, which fill the buffers they are given, or fold and add into those whose flag is set."""


@dataclass(frozen=True)
class Choice:
    """One row of the table; the first whose `applies` holds is taken."""

    implementation: str
    where: str
    why: str
    applies: Callable[[torch.device, torch.dtype, int], bool]
    """Of device, dtype and head_dim."""


CHOICES = (
    Choice(
        "cpu",
        "CPU, any dtype",
        "torch's blocked CPU kernel, forward and backward, run by run",
        lambda device, dtype, head_dim: device.type == "cpu",
    ),
    Choice(
        "reference",
        "GPU, float64",
        "no tensor cores: exactness is what is asked for",
        lambda device, dtype, head_dim: dtype == torch.float64,
    ),
    Choice(
        "triton",
        "GPU, head_dim up to 256 (float32: 128)",
        "any mask, tiles skipped, deterministic, partial results in float32",
        lambda device, dtype, head_dim: head_dim <= longest(dtype) and has_triton(),
    ),
    Choice(
        "reference",
        "GPU, longer heads or no triton",
        "always right; holds all scores",
        lambda device, dtype, head_dim: True,
    ),
)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The row of the table for such a call."""
    return next(choice for choice in CHOICES if choice.applies(device, dtype, head_dim))


def implementation_of(q: Tensor, asked: str | None) -> Any:
    """The module that computes a call: the one asked for, else ARMILLARY_KERNELS', else the table's.

    Raises:
        ValueError: if there is none of that name.
    """
    name = asked or overrides(os.environ.get(VARIABLE, "")).get("attention")
    if name is None or name == "torch":
        name = choose(q.device, q.dtype, q.shape[-1]).implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention: there is no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return importlib.import_module(IMPLEMENTATIONS[name])
