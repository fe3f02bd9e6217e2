"""A Triton kernel that does nothing but read, so that what L2 can deliver is known."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS = 512
"""Some four for each multiprocessor of an H100, and each with as much to read."""


@triton.jit
def _read_kernel(data: tl.tensor, sums: tl.tensor, size: tl.tensor, passes: tl.tensor, BLOCK: tl.constexpr) -> None:
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(passes):
        for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            # ".cg": the multiprocessor's own cache is passed by.
            total += tl.load(data + start + columns, mask=start + columns < size, other=0.0, cache_modifier=".cg")
    tl.store(sums + tl.program_id(0) * BLOCK + columns, total)


def read_many_times(data: Tensor, passes: int) -> Tensor:
    """Sums (PROGRAMS, BLOCK) float32 of all that was read; `data` flat float32."""
    programs = PROGRAMS if data.is_cuda else 4
    sums = torch.empty(programs, BLOCK, device=data.device)
    _read_kernel[(programs,)](data, sums, data.numel(), passes, BLOCK=BLOCK, num_warps=8)
    return sums
