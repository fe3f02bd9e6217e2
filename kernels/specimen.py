"""A kernel as it is shipped: enough to compile it for any GPU on a machine that has none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""GPUs that every shipped configuration must compile for, unless a specimen names fewer."""


@dataclass(frozen=True)
class Specimen:
    """One Triton kernel with one shipped configuration."""

    name: str
    kernel: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str]
    """Type of each argument that is not constant: "*bf16", "*fp32", "i32", "i64", "fp32" and so on."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument."""
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    """What the launch allows a thread on NVIDIA's GPUs; None leaves it to the compiler, which may spill a few registers
    for the sake of more programs at once."""
    unaligned: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that need not be multiples of 16; pointers always are."""
    architectures: tuple[str, ...] = ARCHITECTURES
    tensor_cores: bool = False
    """Whether its products must become `wgmma` on sm_90."""
