"""Block sizes, warps and stages of the attention kernels: a shipped table, so that all ranks run the same code.

Nothing is timed when a run starts: ranks that choose for themselves choose differently (Megatron PR 6966). `make gate`
compiles every entry for its GPU, without one: it must use no stack and fit its shared memory.
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

# For 16-bit inputs: the configuration of each kernel, in their order, for heads up to each bucket.
TABLES: dict[str, dict[int, tuple[BlockConfig, BlockConfig, BlockConfig]]] = {
    "sm_80": {
        64: (BlockConfig(128, 64, 8, 3), BlockConfig(64, 32, 4, 2), BlockConfig(16, 64, 4, 2)),
        128: (BlockConfig(64, 64, 8, 2), BlockConfig(64, 32, 8, 2), BlockConfig(64, 64, 8, 2, split=True)),
        256: (BlockConfig(64, 32, 8, 2), BlockConfig(64, 16, 8, 2), BlockConfig(16, 16, 4, 1)),
    },
    "sm_90": {
        64: (BlockConfig(128, 128, 8, 2), BlockConfig(128, 64, 8, 3), BlockConfig(64, 128, 8, 3)),
        128: (BlockConfig(128, 64, 8, 3), BlockConfig(128, 64, 8, 3), BlockConfig(32, 128, 8, 3)),
        256: (BlockConfig(128, 32, 8, 2), BlockConfig(64, 32, 8, 2), BlockConfig(32, 64, 8, 2, split=True)),
    },
    "sm_100": {
        64: (BlockConfig(128, 32, 8, 2), BlockConfig(128, 64, 8, 3), BlockConfig(64, 128, 8, 3)),
        128: (BlockConfig(128, 32, 8, 2), BlockConfig(128, 32, 8, 2), BlockConfig(32, 128, 8, 3)),
        256: (BlockConfig(64, 32, 8, 2), BlockConfig(64, 32, 8, 2), BlockConfig(32, 64, 8, 2, split=True)),
    },
    "sm_120": {
        64: (BlockConfig(128, 64, 8, 3), BlockConfig(64, 32, 4, 1), BlockConfig(32, 64, 4, 1)),
        128: (BlockConfig(64, 64, 8, 2), BlockConfig(64, 32, 8, 2), BlockConfig(32, 64, 8, 2)),
        256: (BlockConfig(64, 32, 8, 2), BlockConfig(64, 16, 8, 2), BlockConfig(16, 16, 4, 1)),
    },
    "gfx942": {
        64: (BlockConfig(128, 64, 4, 3), BlockConfig(64, 64, 4, 2), BlockConfig(32, 64, 4, 2)),
        128: (BlockConfig(128, 32, 8, 2), BlockConfig(64, 32, 8, 1), BlockConfig(32, 64, 4, 2, split=True)),
        256: (BlockConfig(64, 16, 8, 2), BlockConfig(64, 16, 8, 1), BlockConfig(16, 64, 8, 2, split=True)),
    },
    "gfx950": {
        64: (BlockConfig(128, 64, 4, 3), BlockConfig(128, 64, 4, 2), BlockConfig(32, 64, 4, 2)),
        128: (BlockConfig(128, 32, 8, 2), BlockConfig(64, 32, 4, 2), BlockConfig(32, 64, 4, 2, split=True)),
        256: (BlockConfig(128, 32, 8, 1), BlockConfig(64, 16, 8, 2), BlockConfig(16, 64, 8, 2, split=True)),
    },
}

FLOAT32 = {64: BlockConfig(16, 32, 8, 1), 128: BlockConfig(16, 16, 8, 1)}
"""All kernels on all GPUs: products of float32 are exact, not TF32, and so without tensor cores."""


def block_config(kernel: str, head_dim: int, dtype: torch.dtype, architecture: str) -> BlockConfig:
    """The shipped configuration.

    Args:
        kernel: one of KERNELS.
        head_dim: up to `longest(dtype)`.
        dtype: of q, k and v.
        architecture: such as sm_90 or gfx942; one without a table has that of a near relative.

    Raises:
        ValueError: if a head is too long.
    """
    bucket = next((most for most in BUCKETS if head_dim <= most), 0)
    if head_dim > longest(dtype):
        raise ValueError(f"attention: head_dim {head_dim} of {dtype} is more than the {longest(dtype)} that is allowed")
    if dtype == torch.float32:
        return FLOAT32[bucket]
    return TABLES[relative(architecture)][bucket][KERNELS.index(kernel)]


def longest(dtype: torch.dtype) -> int:
    """The longest head that the kernels serve."""
    return max(FLOAT32 if dtype == torch.float32 else BUCKETS)


def relative(architecture: str) -> str:
    """The GPU whose table serves this one: itself, its own generation's, or the one with the least shared memory."""
    if architecture in TABLES:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    return {"sm_9": "sm_90", "sm_10": "sm_100"}.get(architecture[:-1], "sm_120")
