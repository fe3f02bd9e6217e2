"""Every collective gives what it promises and counts exactly the bytes that its formula says."""

import pytest
import torch
import torch.distributed as dist

from armillary.comm import collectives
from armillary.comm.ledger import Ledger

PURPOSE = "test"


def exercise(rank: int, num_ranks: int) -> dict[str, int]:
    group, ledger = dist.group.WORLD, Ledger()
    facts = {"group": group, "ledger": ledger, "purpose": PURPOSE}

    tensor = torch.full((6,), float(rank), dtype=torch.float64)
    collectives.all_reduce(tensor, **facts)
    assert torch.equal(tensor, torch.full((6,), num_ranks * (num_ranks - 1) / 2, dtype=torch.float64))

    gathered = torch.full((2 * num_ranks,), float("nan"))
    collectives.all_gather(gathered, torch.tensor([rank, rank + 0.5]), **facts)
    assert gathered.tolist() == [r + x for r in range(num_ranks) for x in (0, 0.5)]

    scattered = torch.full((3,), float("nan"))
    collectives.reduce_scatter(scattered, torch.arange(3.0 * num_ranks) * (rank + 1), **facts)
    total = num_ranks * (num_ranks + 1) / 2
    assert scattered.tolist() == [total * (3 * rank + i) for i in range(3)]

    # Rank r sends i + 1 elements of value r to rank i.
    sent = torch.full((num_ranks * (num_ranks + 1) // 2,), float(rank))
    received = torch.full((num_ranks * (rank + 1),), float("nan"))
    collectives.all_to_all(received, sent, [rank + 1] * num_ranks, list(range(1, num_ranks + 1)), **facts)
    assert received.tolist() == [float(r) for r in range(num_ranks) for _ in range(rank + 1)]

    text = collectives.broadcast_text("Ångström" if rank == 0 else "", device=torch.device("cpu"), **facts)
    assert text == "Ångström"
    return {collective: entry.bytes for (_, collective), entry in ledger.entries.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_results_and_bytes(world, num_ranks):
    for rank, counted in enumerate(world(exercise, num_ranks, num_ranks)):
        others = num_ranks - 1
        expected = {
            "all_reduce": 2 * others * 6 * 8 // num_ranks,
            "all_gather": others * 2 * 4,
            "reduce_scatter": others * 3 * 4,
            "all_to_all": (num_ranks * (num_ranks + 1) // 2 - (rank + 1)) * 4,
        }
        if rank == 0:
            expected["broadcast"] = others * (8 + len("Ångström".encode()))
        assert counted == expected


def test_the_ledger_sums_by_purpose():
    ledger = Ledger()
    ledger.record("weights", "all_gather", 10)
    ledger.record("weights", "all_gather", 5)
    ledger.record("gradients", "reduce_scatter", 7)
    assert ledger.by_purpose() == {"gradients": 7, "weights": 15}
    assert ledger.bytes() == 22
    assert ledger.entries["weights", "all_gather"].calls == 2
    ledger.clear()
    assert ledger.bytes() == 0
