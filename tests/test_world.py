"""The helper that every distributed test rests on must itself fail when it should."""

import os
import time

import pytest
import torch
import torch.distributed as dist


def sum_of_ranks(rank: int, offset: int) -> float:
    tensor = torch.tensor(float(rank + offset))
    dist.all_reduce(tensor)
    return tensor.item()


def raise_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("planted")
    dist.barrier()


def die_on_rank_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_results_come_in_rank_order(world):
    assert world(sum_of_ranks, 3, 10) == [33.0] * 3


def test_a_failing_rank_is_named_and_stops_the_others(world, rank_failure):
    start = time.monotonic()
    with pytest.raises(rank_failure, match=r"(?s)rank 1.*planted"):
        world(raise_on_rank_one, 3)
    assert time.monotonic() - start < 20


def test_a_rank_that_dies_is_noticed(world, rank_failure):
    with pytest.raises(rank_failure, match="rank 1\ndied with exit code 7"):
        world(die_on_rank_one, 2)
