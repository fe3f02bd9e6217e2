"""Block sizes, warps and stages of the attention kernels: a shipped table, so that all ranks run the same code.

Nothing is timed when a run starts: ranks that choose for themselves choose differently (Megatron PR 6966). Every entry
is compiled for its GPU in CI, without one, and must use no stack and fit its shared memory (`make gate`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockConfig:
    """Queries and keys a tile, warps a program, and loads in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    split: bool = False
    """Whether gradients of keys and of values are a launch each: their sums together do not fit the registers."""


BUCKETS = (64, 128, 256)
"""Heads up to these lengths share a configuration."""
MOST_REGISTERS = 255
"""Asked for by name on NVIDIA's GPUs: left alone, ptxas spills some for the sake of more programs at once."""
KERNELS = ("forward", "query_gradient", "key_gradient")

# (kernel, head_dim up to) -> config, for 16-bit inputs, by architecture; the first that fits is taken.
_HOPPER = {
    ("forward", 64): BlockConfig(128, 128, 8, 2),
    ("forward", 128): BlockConfig(128, 64, 8, 3),
    ("forward", 256): BlockConfig(64, 64, 8, 2),
    ("query_gradient", 64): BlockConfig(128, 64, 8, 3),
    ("query_gradient", 128): BlockConfig(128, 64, 8, 2),
    ("query_gradient", 256): BlockConfig(64, 32, 8, 2),
    ("key_gradient", 64): BlockConfig(64, 128, 8, 3),
    ("key_gradient", 128): BlockConfig(64, 128, 8, 2),
    ("key_gradient", 256): BlockConfig(32, 64, 8, 2),
}
TABLES = {"sm_90": _HOPPER}


def block_config(kernel: str, head_dim: int, dtype: torch.dtype, architecture: str) -> BlockConfig:
    """The shipped configuration.

    Args:
        kernel: one of KERNELS.
        head_dim: up to 256.
        dtype: of q, k and v.
        architecture: such as sm_90 or gfx942; the nearest known one serves others.
    """
    table = TABLES.get(architecture, _HOPPER)
    return next(config for (name, most), config in table.items() if name == kernel and head_dim <= most)
