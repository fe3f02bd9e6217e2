"""Exchanges deliver what was sent, whatever is in flight with them, and count every byte once."""

import math
import time

import pytest
import torch
import torch.distributed as dist

from armillary.comm import exchange
from armillary.comm.exchange import Receive, Send
from armillary.comm.ledger import Ledger


def poison() -> None:
    def full_of_nan(shape, dtype, device):
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    exchange.new_buffer = full_of_nan


def several_in_flight(rank: int, num_ranks: int) -> int:
    """Every rank sends three messages, one of them empty, to each other in each of four exchanges, then waits last
    first."""
    poison()
    ledger, cpu = Ledger(), torch.device("cpu")
    others = [r for r in range(num_ranks) if r != rank]
    flights = []
    for step in range(4):
        sends, receives = [], []
        for other in others:
            # Not contiguous on purpose.
            sends += [Send(torch.full((3, 2), 100.0 * step + rank).t(), other), Send(torch.zeros(0, 5), other)]
            sends.append(Send(torch.full((other + 1,), rank + 0.5, dtype=torch.float64), other))
            receives += [Receive((2, 3), torch.float32, other), Receive((0, 5), torch.float32, other)]
            receives.append(Receive((rank + 1,), torch.float64, other))
        facts = {"group": dist.group.WORLD, "ledger": ledger, "purpose": "test", "device": cpu}
        flights.append(exchange.start(sends, receives, tag=step, **facts))
    for step, flight in reversed(list(enumerate(flights))):
        received = flight.wait()
        for place, other in enumerate(others):
            first, none, second = received[3 * place : 3 * place + 3]
            assert first.tolist() == [[100.0 * step + other] * 3] * 2
            assert none.shape == (0, 5)
            assert second.tolist() == [other + 0.5] * (rank + 1)
        assert flight.wait() is received
    assert ledger.entries["test", "send"].calls == 4 * 2 * len(others)
    return ledger.bytes("test")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_messages_and_bytes(world, num_ranks):
    for rank, counted in enumerate(world(several_in_flight, num_ranks, num_ranks)):
        assert counted == 4 * sum(6 * 4 + (other + 1) * 8 for other in range(num_ranks) if other != rank)


def late_receiver(rank: int) -> float:
    """Rank 1 posts its receive late; rank 0's start returns at once all the same."""
    facts = {"group": dist.group.WORLD, "ledger": Ledger(), "purpose": "test", "device": torch.device("cpu")}
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    if rank == 1:
        time.sleep(0.3)
        (received,) = exchange.start([], [Receive((1 << 20,), torch.float32, 0)], **facts).wait()
        assert torch.equal(received, tensor)
        return 0.0
    begin = time.perf_counter()
    flight = exchange.start([Send(tensor, 1)], [], **facts)
    started = time.perf_counter() - begin
    flight.wait()
    return started


def test_the_caller_may_compute_meanwhile(world):
    assert world(late_receiver, 2)[0] < 0.2


def alone(rank: int) -> int:
    facts = {"group": dist.group.WORLD, "ledger": Ledger(), "purpose": "test", "device": torch.device("cpu")}
    return len(exchange.start([], [], **facts).wait())


def test_nothing_to_exchange(world):
    assert world(alone, 1) == [0]
