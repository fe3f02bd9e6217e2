"""The link between the ranks of a group, measured: what one exchange between neighbours takes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from armillary.comm.collectives import all_reduce
from armillary.comm.exchange import Receive, Send, start
from armillary.comm.ledger import Ledger

SMALLEST, LARGEST = 2**18, 2**24
"""Bytes of a message: grown from the one up to the other until an exchange takes `LONG`."""
LONG = 0.02
"""Seconds of an exchange against which its start is little."""
REPETITIONS = 5


@dataclass(frozen=True)
class Link:
    """What joins the ranks."""

    rate: float
    """Bytes a second, each way."""
    latency: float = 0.0
    """Seconds before the first byte of an exchange arrives."""
    own_links: bool = False
    """Whether each pair of ranks has a duplex link of its own; else each rank has one duplex port for all."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.rate if num_bytes else 0.0

    def __str__(self) -> str:
        kind = "a link for each pair" if self.own_links else "one port a rank"
        return f"{kind}, {with_unit(self.rate, 'B/s')}, {with_unit(self.latency, 's')} latency"


def with_unit(value: float, unit: str) -> str:
    """Three digits, a prefix and the unit: 45 GB/s."""
    if value == 0:
        return f"0 {unit}"
    power = min(max(math.floor(math.log10(abs(value)) / 3), -3), 4)
    return f"{value / 1000**power:.3g} {['n', 'µ', 'm', '', 'k', 'M', 'G', 'T'][power + 3]}{unit}"


def measure_link(group: dist.ProcessGroup, ledger: Ledger, device: torch.device) -> Link:
    """The link between neighbours of a group, the same on all its ranks: that of the slowest.

    Every rank sends to the next and receives from the one before, as in a ring; then to both neighbours at once. What
    takes nearly as long with twice the bytes has two links.
    """
    rank, size = group.rank(), group.size()
    after, before = (rank + 1) % size, (rank - 1) % size

    def seconds(num_bytes: int, peers: Sequence[tuple[int, int]]) -> float:
        """Of one exchange, on the slowest rank, the median of several; (to, from) for each message."""
        message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        sends = [Send(message, to) for to, _ in peers]
        receives = [Receive((num_bytes,), torch.uint8, source) for _, source in peers]
        times = []
        for repetition in range(REPETITIONS + 1):
            began = time.perf_counter()
            start(sends, receives, group=group, ledger=ledger, purpose="measurement", device=device).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
            all_reduce(elapsed, group=group, ledger=ledger, purpose="measurement", op=dist.ReduceOp.MAX)
            if repetition > 0:  # the first one connects
                times.append(elapsed.item())
        return median(times)

    onward, both = [(after, before)], [(after, before), (before, after)]
    latency, num_bytes = seconds(8, onward), SMALLEST
    while (taken := seconds(num_bytes, onward)) < LONG and num_bytes < LARGEST:
        num_bytes *= 4
    wire = max(taken - latency, 1e-9)
    own_links = size > 2 and seconds(num_bytes, both) - latency < 1.5 * wire
    return Link(num_bytes / wire, latency, own_links)
