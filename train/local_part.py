"""What one rank holds of a tensor, and under which names and dtypes a checkpoint has it."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from armillary.train.shards import Box, whole

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


def local_part(name: str, tensor: "Tensor | Local", rank: int) -> Local:
    """This rank's part of a tensor: as given, or a DTensor's local shard, or the whole of a plain one.

    Of the ranks that hold the same shard, the one at coordinate 0 of the replicated mesh axes writes it; a plain
    tensor, which is the same on all ranks, rank 0.

    Raises:
        ValueError: if the tensor's dtype, or the way it is sharded, cannot be stored.
    """
    if isinstance(tensor, Local):
        return tensor
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}; a checkpoint can hold {', '.join(map(str, DTYPE_NAMES))}")
    dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            return Local(dtype, shape, whole(shape), tensor.detach(), rank == 0)
        coordinate = tensor.device_mesh.get_coordinate()
        data = tensor.to_local()
    if coordinate is None:
        return Local(dtype, shape, Box((0,) * len(shape), (0,) * len(shape)), data, False)
    _check_placements(name, tensor)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(data.shape) == tuple(sizes), f"{name}: local shape {tuple(data.shape)}, by its placements {sizes}"
    replicas = [index for index, place in zip(coordinate, tensor.placements, strict=True) if place.is_replicate()]
    return Local(dtype, shape, Box(tuple(offsets), tuple(sizes)), data, not any(replicas))


def _check_placements(name: str, tensor: DTensor) -> None:
    """Refuses what is no box: partial sums, and strided shards (FSDP over tensor parallelism) that divide unevenly."""
    mesh: DeviceMesh = tensor.device_mesh
    dims = [getattr(place, "dim", -1) for place in tensor.placements]
    for axis, place in enumerate(tensor.placements):
        if place.is_partial():
            raise ValueError(f"tensor {name!r} is a partial sum on each rank; reduce it before it is saved or loaded")
        stride = getattr(place, "split_factor", 1)
        inner = math.prod(mesh.size(a) for a in range(axis + 1, mesh.ndim) if dims[a] == dims[axis])
        outer = math.prod(mesh.size(a) for a in range(axis + 1) if dims[a] == dims[axis])
        if stride > 1 and (stride != inner or tensor.shape[dims[axis]] % (outer * inner)):
            raise ValueError(
                f"tensor {name!r} {tuple(tensor.shape)}, sharded as {tensor.placements} on a mesh {tuple(mesh.shape)}, "
                f"gives a rank rows that do not touch; choose degrees whose product divides its dim {dims[axis]}"
            )


def owner(name: str) -> int | None:
    """The rank whose own state a stored name belongs to."""
    match = re.match(r"rank-(\d+)/", name)
    return int(match[1]) if match else None
