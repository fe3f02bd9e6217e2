"""One pass of context parallelism without its transfers, and its transfers without the pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from armillary.comm.exchange import Exchange, Receive, Send, new_buffer
from armillary.parallel.context.call import Call

Event = Callable[[dict[int, Exchange]], object]
"""Starts an exchange, which it adds under its number, or waits for one."""


@dataclass(frozen=True)
class Tiles(Call):
    """A call whose exchanges send nothing: what is received is there at once, and finite."""

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], like: Tensor, tag: int) -> Exchange:
        buffers = [new_buffer(receive.shape, receive.dtype, like.device).fill_(0.01) for receive in receives]
        return Exchange([], buffers, [send.tensor.contiguous() for send in sends])


@dataclass(frozen=True)
class Watched(Call):
    """A call that notes what it starts and waits for, so that this can be done again without the tiles."""

    events: list[Event] = field(default_factory=list)

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], like: Tensor, tag: int) -> Exchange:
        number, call, events = len(self.events), self, self.events

        class Noted(Exchange):
            def wait(self) -> list[Tensor]:
                events.append(lambda flights: flights[number].wait())
                return super().wait()

        def again(flights: dict[int, Exchange]) -> None:
            flights[number] = Call.start(call, sends, receives, like, tag)

        self.events.append(again)
        real = super().start(sends, receives, like, tag)
        return Noted(real._works, real._received, real._kept)


def repeat(events: Sequence[Event]) -> None:
    """The exchanges of a watched pass once more."""
    flights: dict[int, Exchange] = {}
    for event in events:
        event(flights)
