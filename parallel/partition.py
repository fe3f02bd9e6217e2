"""Weights, gradients and optimizer state sharded over the data-parallel ranks: FSDP2, with counted collectives."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from armillary.comm import collectives
from armillary.comm.ledger import Ledger
from armillary.parallel.plan import Partition


class _AllGather:
    """FSDP2's weight all-gather through the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        return collectives.all_gather(
            output_tensor, input_tensor, group=group, ledger=self.ledger, purpose="weights", async_op=async_op
        )


class _ReduceScatter:
    """FSDP2's gradient reduce-scatter through the ledger: a sum, since the loss is already the global mean."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        assert op == dist.ReduceOp.SUM, op
        return collectives.reduce_scatter(
            output_tensor, input_tensor, group=group, ledger=self.ledger, purpose="gradients"
        )


def shard(
    model: nn.Module,
    partition: Partition,
    *,
    mesh: DeviceMesh,
    compute: torch.dtype,
    ledger: Ledger,
) -> None:
    """Shards every parameter of a Transformer, or of a stage of one, over `mesh`, block by block, in place.

    Parameters keep their dtype; forward and backward run in `compute`; gradients are summed over the ranks in float32
    (float64 for a float64 model), never averaged.
    """
    reduce = torch.float64 if compute == torch.float64 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    for block in model.blocks.values():  # type: ignore[operator]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=partition.weights == "all")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_AllGather(ledger))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(_ReduceScatter(ledger))  # type: ignore[arg-type]
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
