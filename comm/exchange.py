"""Transfers between single ranks, counted, that run while the caller computes.

An exchange is what one rank sends and receives in one step. Both ends know every message's shape; a message of no
elements is not sent. Where a step's transfers between the same two ranks are several, both list them in the same order.
Exchanges may be in flight together, each with its own tag; all ranks start those they share in the same order.

Receives are posted before sends: on gloo a pair that sends first runs half-duplex. On NCCL a step is one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.ledger import Ledger

MESSAGES = 64
"""Messages between two ranks in one exchange at most: each has its own tag."""


@dataclass(frozen=True)
class Send:
    """A tensor, copied if it is not contiguous, for the group's rank `to`."""

    tensor: Tensor
    to: int


@dataclass(frozen=True)
class Receive:
    """What the group's rank `source` sends: `shape` and `dtype` are those of its tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: int


class Exchange:
    """Transfers under way. Keeps their tensors until `wait`."""

    def __init__(self, works: list[dist.Work], received: list[Tensor], kept: list[Tensor]) -> None:
        self._works, self._received, self._kept = works, received, kept

    def wait(self) -> list[Tensor]:
        """The received tensors, in the order asked for; may be called again. On a GPU the current stream waits."""
        for work in self._works:
            work.wait()
        self._works, self._kept = [], []
        return self._received


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a message is received. Tests put one in its place that is full of NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def start(
    sends: Sequence[Send],
    receives: Sequence[Receive],
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
    purpose: str,
    device: torch.device,
    tag: int = 0,
) -> Exchange:
    """Starts an exchange and returns at once.

    Args:
        sends: what leaves this rank; the tensors must not change before `wait`.
        receives: what comes; buffers are made on `device`.
        group: the group by whose ranks both are numbered.
        ledger: each message's bytes are counted as a `send` for `purpose`, on the rank that sends it.
        tag: tells exchanges apart that are in flight together; the same on both ends.
    """
    received = [new_buffer(receive.shape, receive.dtype, device) for receive in receives]
    kept = [send.tensor.contiguous() for send in sends]
    for tensor in kept:
        if tensor.numel():
            ledger.record(purpose, "send", tensor.numel() * tensor.element_size())
    incoming = _numbered(received, [receive.source for receive in receives])
    outgoing = _numbered(kept, [send.to for send in sends])
    first = tag * MESSAGES
    works: list[dist.Work | None]
    if device.type == "cpu":
        works = [dist.irecv(t, group=group, group_src=peer, tag=first + n) for t, peer, n in incoming]
        works += [dist.isend(t, group=group, group_dst=peer, tag=first + n) for t, peer, n in outgoing]
    else:
        operations = [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for t, peer, _ in incoming]
        operations += [dist.P2POp(dist.isend, t, group=group, group_peer=peer) for t, peer, _ in outgoing]
        works = list(dist.batch_isend_irecv(operations)) if operations else []
    return Exchange([work for work in works if work is not None], received, kept)


def _numbered(tensors: list[Tensor], peers: list[int]) -> list[tuple[Tensor, int, int]]:
    """Tensors that have elements, their peers, and the number of each among those with the same peer."""
    count: dict[int, int] = {}
    numbered = []
    for tensor, peer in zip(tensors, peers, strict=True):
        if tensor.numel():
            numbered.append((tensor, peer, count.get(peer, 0)))
            count[peer] = count.get(peer, 0) + 1
    assert max(count.values(), default=0) <= MESSAGES
    return numbered
