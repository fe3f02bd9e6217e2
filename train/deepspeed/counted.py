"""DeepSpeed's collectives, counted like ours. It looks its backend up in a global; here that is set."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.ledger import Ledger


def count_bytes(ledger: Ledger, device: torch.device) -> None:
    """Puts a backend in DeepSpeed's place for it that counts, and that does not compile one for shared memory first."""
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    class Counted(TorchBackend):
        def all_reduce(
            self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
        ) -> Any:
            count = self.get_world_size(group)
            ledger.record("gradients", "all_reduce", 2 * (count - 1) * tensor.nbytes // count)
            return super().all_reduce(tensor, op, group, async_op)

        def reduce(
            self, tensor: Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
        ) -> Any:
            ledger.record("gradients", "reduce", tensor.nbytes if self.get_rank() != dst else 0)
            return super().reduce(tensor, dst, op, group, async_op)

        def reduce_scatter_tensor(
            self,
            output_tensor: Tensor,
            input_tensor: Tensor,
            op: Any = dist.ReduceOp.SUM,
            group: Any = None,
            async_op: bool = False,
        ) -> Any:
            ledger.record("gradients", "reduce_scatter", (self.get_world_size(group) - 1) * output_tensor.nbytes)
            return super().reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)

        def all_gather_into_tensor(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
        ) -> Any:
            ledger.record("weights", "all_gather", (self.get_world_size(group) - 1) * input_tensor.nbytes)
            return super().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)

        def all_gather(self, tensor_list: Any, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
            ledger.record("weights", "all_gather", (self.get_world_size(group) - 1) * tensor.nbytes)
            return super().all_gather(tensor_list, tensor, group, async_op)

        def broadcast(self, tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
            sent = (self.get_world_size(group) - 1) * tensor.nbytes if self.get_rank() == src else 0
            ledger.record("setup", "broadcast", sent)
            return super().broadcast(tensor, src, group, async_op)

    from deepspeed import ops

    # The list is made by trying every compiler; all that is read of it is whether to build for shared memory.
    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    comm.cdb = Counted("nccl" if device.type == "cuda" else "gloo", timeout=None, init_method=None)
