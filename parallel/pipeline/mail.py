"""Messages between pipeline stages on different ranks: hidden forward, its gradient backward.

They go through comm/exchange.py, a message an exchange, each with its own tag; one without elements is not sent. Order
still matters where there are no tags (NCCL): ranks send and receive in the order in which the runtime's lists have it,
which is a part of one common sequence (parallel/schedule/check.py), so a rank may wait for any send that it has begun.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm import exchange
from armillary.comm.ledger import Ledger

PURPOSE = "pipeline"
IN_FLIGHT = 4
"""Gradients that a rank has on the way at most: it keeps each until it is known to have arrived."""


class Letter(NamedTuple):
    """Which message: from this stage, of this micro-batch, forward or backward."""

    stage: int
    micro_batch: int
    forward: bool


class Mail:
    """What one rank has on the way to and from its stages' neighbours."""

    def __init__(
        self,
        stage_ranks: Sequence[int],
        *,
        group: dist.ProcessGroup,
        ledger: Ledger,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.stage_ranks, self.group, self.ledger, self.device, self.dtype = stage_ranks, group, ledger, device, dtype
        self._sent: dict[Letter, exchange.Exchange] = {}
        self._coming: dict[Letter, exchange.Exchange] = {}

    def local(self, stage: int) -> bool:
        """Whether the stage exists and is on this rank."""
        return 0 <= stage < len(self.stage_ranks) and self.stage_ranks[stage] == self.group.rank()

    def send(self, letter: Letter, tensor: Tensor) -> None:
        """Starts to send to the stage after the letter's, or before it."""
        neighbour = letter.stage + (1 if letter.forward else -1)
        send = exchange.Send(tensor.detach(), self.stage_ranks[neighbour])
        self._sent[letter] = self._start([send], [], letter)
        gradients = [sent for sent in self._sent if not sent.forward]
        if len(gradients) > IN_FLIGHT:
            self.settle(gradients[0])

    def expect(self, letter: Letter, shape: tuple[int, ...]) -> None:
        """Starts to receive a letter of this shape."""
        receive = exchange.Receive(shape, self.dtype, self.stage_ranks[letter.stage])
        self._coming[letter] = self._start([], [receive], letter)

    def open(self, letter: Letter) -> Tensor:
        """The content of a letter that was expected; waits for it."""
        (tensor,) = self._coming.pop(letter).wait()
        return tensor

    def settle(self, letter: Letter) -> None:
        """Waits until a letter has left, if it was sent, and lets go of it."""
        if (sent := self._sent.pop(letter, None)) is not None:
            sent.wait()

    def settle_all(self) -> None:
        for letter in list(self._sent):
            self.settle(letter)

    @property
    def empty(self) -> bool:
        return not self._sent and not self._coming

    def _start(self, sends: list[exchange.Send], receives: list[exchange.Receive], letter: Letter) -> exchange.Exchange:
        number = (letter.micro_batch * len(self.stage_ranks) + letter.stage) * 2 + letter.forward
        return exchange.start(
            sends,
            receives,
            group=self.group,
            ledger=self.ledger,
            purpose=PURPOSE,
            device=self.device,
            tag=number % 2**20,
        )


def bytes_sent(
    stage_ranks: Sequence[int], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, backward: bool = True
) -> list[int]:
    """Bytes that each rank sends for micro-batches whose hidden has these shapes: one message forward for each pair of
    neighbouring stages on unlike ranks, and with `backward` one back.

    >>> bytes_sent((0, 1, 1, 0), [(2, 3)], torch.float32)
    [48, 48]
    """
    size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    sent = [0] * (max(stage_ranks) + 1)
    for before, after in pairwise(stage_ranks):
        if before != after:
            sent[before] += size
            sent[after] += size if backward else 0
    return sent
