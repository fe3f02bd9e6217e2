"""Gradients of parameters that several tensor ranks hold alike: each has the share of its own tokens or heads."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm import exchange
from armillary.comm.collectives import all_reduce
from armillary.comm.exchange import Receive, Send
from armillary.comm.ledger import Ledger
from armillary.parallel.cut import Cut


def sum_replicas(
    gradients: dict[str, Tensor],
    cuts: dict[str, Cut],
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
    purpose: str = "replicas",
) -> None:
    """Sums, in place, the gradients of parameters of which other ranks of `group` hold the same part; all of them get
    the same bits.

    One all-reduce for each dtype where all ranks hold the same; where some do (key heads), these exchange their
    gradients and each adds them in rank order, in float32 at least.

    Args:
        gradients: by parameter, some or all of those in `cuts`, the same on every rank of the group; plain tensors of
            equal shape on the ranks that hold the same part; they may be shards of it, also empty ones.
    """
    rank = group.rank()
    shared: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
    for name, cut in cuts.items():
        holders = cut.holders(rank)
        if name in gradients and len(holders) > 1:
            shared.setdefault((holders, gradients[name].dtype), []).append(gradients[name])
    for (holders, _), tensors in shared.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if not flat.numel():
            continue
        if len(holders) == group.size():
            all_reduce(flat, group=group, ledger=ledger, purpose=purpose)
        else:
            flat = _sum_in_order(flat, holders, group, ledger, purpose)
        _spread(flat, tensors)


def _sum_in_order(
    flat: Tensor, holders: tuple[int, ...], group: dist.ProcessGroup, ledger: Ledger, purpose: str
) -> Tensor:
    others = [holder for holder in holders if holder != group.rank()]
    flight = exchange.start(
        [Send(flat, other) for other in others],
        [Receive(tuple(flat.shape), flat.dtype, other) for other in others],
        group=group,
        ledger=ledger,
        purpose=purpose,
        device=flat.device,
    )
    parts = dict(zip(others, flight.wait(), strict=True)) | {group.rank(): flat}
    wide = flat.dtype if flat.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(flat, dtype=wide)
    for holder in holders:
        total += parts[holder]
    return total


def _spread(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    first = 0
    for tensor in tensors:
        tensor.copy_(flat[first : first + tensor.numel()].view(tensor.shape))
        first += tensor.numel()
