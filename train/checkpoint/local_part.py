"""What one rank holds of a tensor, and under which names and dtypes a checkpoint has it."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.train.checkpoint.boxes import Box, whole

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""By safetensors' names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Local:
    """This rank's part of a tensor: where it lies in the whole, its data, and whether this rank writes it."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor
    writes: bool

    def __post_init__(self) -> None:
        assert tuple(self.data.shape) == self.box.sizes, f"data {tuple(self.data.shape)} for {self.box} of {self.shape}"


def whole_part(name: str, tensor: Tensor, writes: bool = True) -> Local:
    """A tensor that this rank holds whole: plain, not a DTensor.

    Raises:
        ValueError: if its dtype cannot be stored.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}; a checkpoint can hold {', '.join(map(str, DTYPE_NAMES))}")
    shape = tuple(tensor.shape)
    return Local(DTYPE_NAMES[tensor.dtype], shape, whole(shape), tensor.detach(), writes)


def owner(name: str) -> int | None:
    """The rank whose own state a stored name belongs to."""
    match = re.match(r"rank-(\d+)/", name)
    return int(match[1]) if match else None
