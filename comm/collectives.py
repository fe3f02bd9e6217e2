"""Collectives that count what they move. Every collective of Armillary goes through here, FSDP2's too.

The group is always passed in. On CPU a reduce-scatter sums in rank order, and gloo's all-reduce gives every rank the
same bits in every run.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.ledger import Ledger

# torch 2.13 renamed these two and warns; 2.11 has only the old names.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning)
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def all_reduce(
    tensor: Tensor, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str, op: Any = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces `tensor` in place over the group; 2 (n - 1) / n of its bytes leave each rank."""
    num_ranks = group.size()
    ledger.record(purpose, "all_reduce", 2 * (num_ranks - 1) * _size(tensor) // num_ranks)
    dist.all_reduce(tensor, op=op, group=group)
    return tensor


def broadcast(tensor: Tensor, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str, source: int = 0) -> Tensor:
    """Copies the tensor of the group's rank `source` to all others, in place."""
    if group.rank() == source:
        ledger.record(purpose, "broadcast", _size(tensor) * (group.size() - 1))
    dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def all_gather(
    output: Tensor, shard: Tensor, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str, async_op: bool = False
) -> dist.Work | None:
    """Concatenates the equal, flat shards of all ranks into `output`, in rank order."""
    ledger.record(purpose, "all_gather", (group.size() - 1) * _size(shard))
    return _all_gather_flat(output, shard, group=group, async_op=async_op)


def all_to_all(
    output: Tensor,
    input: Tensor,
    output_sizes: Sequence[int] | None = None,
    input_sizes: Sequence[int] | None = None,
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
    purpose: str,
) -> None:
    """Sends piece i of the flat `input` to rank i; sizes are in elements, equal pieces when left out."""
    own = input.numel() // group.size() if input_sizes is None else input_sizes[group.rank()]
    ledger.record(purpose, "all_to_all", (input.numel() - own) * input.element_size())
    sizes = [list(s) if s is not None else None for s in (output_sizes, input_sizes)]
    dist.all_to_all_single(output, input, sizes[0], sizes[1], group=group)


def reduce_scatter(
    output: Tensor, input: Tensor, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str
) -> dist.Work | None:
    """Sums the flat `input` over the ranks and keeps this rank's equal piece in `output`.

    gloo's own reduce-scatter is an all-reduce that moves twice the bytes, so on CPU the pieces are exchanged and
    summed here, in rank order.
    """
    start_reduce_scatter(output, input, group=group, ledger=ledger, purpose=purpose, async_op=False).wait()
    return None


@dataclass
class Scattering:
    """A reduce-scatter under way, with what must live until it ends."""

    work: dist.Work | None
    output: Tensor
    input: Tensor
    pieces: Tensor | None
    """On the CPU what all ranks have of this one's piece, (ranks, elements)."""

    def wait(self) -> None:
        """Ends it: on the CPU sums the pieces, on a GPU makes the current stream wait."""
        if self.work is not None:
            self.work.wait()
        if self.pieces is not None:
            torch.sum(self.pieces, dim=0, out=self.output.view(-1))


def start_reduce_scatter(
    output: Tensor, input: Tensor, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str, async_op: bool = True
) -> Scattering:
    """`reduce_scatter` that runs while the caller computes; `input` must not change before `wait`."""
    ledger.record(purpose, "reduce_scatter", (group.size() - 1) * _size(output))
    if input.device.type != "cpu":
        return Scattering(_reduce_scatter_flat(output, input, group=group, async_op=async_op), output, input, None)
    pieces = torch.empty_like(input)
    work = dist.all_to_all_single(pieces, input, group=group, async_op=async_op)
    return Scattering(work, output, input, pieces.view(group.size(), -1))


def broadcast_text(
    text: str, *, group: dist.ProcessGroup, ledger: Ledger, purpose: str, device: torch.device, source: int = 0
) -> str:
    """The text of the group's rank `source`, on every rank; sent as UTF-8 bytes, never as a Python object."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], device=device)
    broadcast(length, group=group, ledger=ledger, purpose=purpose, source=source)
    if int(length) == 0:
        return ""
    if group.rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    broadcast(data, group=group, ledger=ledger, purpose=purpose, source=source)
    return bytes(data.tolist()).decode()
