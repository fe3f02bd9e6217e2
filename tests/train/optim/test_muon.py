"""Muon against torch's own, and sharded over ranks against one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from armillary.comm.ledger import Ledger
from armillary.parallel.cut import Cut
from armillary.train.optim import muon
from armillary.train.optim.muon import Muon, Spread, flops, orthogonalise, plan_buckets

SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
# Rows that divide nothing; fewer rows than ranks; tall, wide, equal ones.
SHAPES = [(7, 5), (1, 6), (2, 9), (16, 4), (5, 5), (5, 5), (3, 11), (13, 8)]
BUCKETS = (60, 32 * 2**20)
shapes_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30)


def shard_rows(num_rows: int, num_ranks: int) -> list[int]:
    return [Cut.whole((num_rows, 1)).shard(0, rank, num_ranks)[1][0] for rank in range(num_ranks)]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train_whole(steps: int) -> list[np.ndarray]:
    """The matrices after some steps on one process, in float64."""
    matrices = [torch.nn.Parameter(random(shape, i)) for i, shape in enumerate(SHAPES)]
    optimizer = Muon(matrices, **SETTINGS, group=None, ledger=Ledger())
    for step in range(steps):
        for i, matrix in enumerate(matrices):
            matrix.grad = random(matrix.shape, 100 * step + i)
        optimizer.step()
    return [matrix.detach().numpy() for matrix in matrices]


def train_sharded(rank: int, steps: int, bucket: int) -> tuple[list[np.ndarray], int, int]:
    """The same on the ranks of the default group; the whole matrices, bytes sent and number of exchanges."""
    muon.BUCKET_ELEMENTS = bucket
    mesh, ledger = init_device_mesh("cpu", (dist.get_world_size(),)), Ledger()
    matrices: list[Any] = [
        torch.nn.Parameter(distribute_tensor(random(shape, i), mesh, [Shard(0)])) for i, shape in enumerate(SHAPES)
    ]
    spreads = {p: Spread.of(Cut.whole(tuple(p.shape)), dist.get_world_size()) for p in matrices}
    optimizer = Muon(matrices, **SETTINGS, group=mesh.get_group(), ledger=ledger, spreads=spreads)
    for step in range(steps):
        for i, matrix in enumerate(matrices):
            matrix.grad = distribute_tensor(random(tuple(matrix.shape), 100 * step + i), mesh, [Shard(0)])
        optimizer.step()
    assert all(isinstance(optimizer.state[m]["momentum_buffer"], DTensor) for m in matrices)
    whole = [matrix.full_tensor().detach().numpy() for matrix in matrices]
    return whole, ledger.bytes("muon"), ledger.entries["muon", "all_to_all"].calls


def train_sharded_in_one_bucket_and_in_many(rank: int) -> list[tuple[list[np.ndarray], int, int]]:
    return [train_sharded(rank, 3, bucket) for bucket in BUCKETS]


@pytest.mark.parametrize("ranks", [3, 4])
def test_sharded_equals_whole(world: Callable[..., list[Any]], ranks: int) -> None:
    expected = train_whole(3)
    results = world(train_sharded_in_one_bucket_and_in_many, ranks)
    for case, bucket in enumerate(BUCKETS):
        for matrices, _, _ in (of_rank[case] for of_rank in results):
            error = max(abs(a - b).max() / abs(b).max() for a, b in zip(matrices, expected, strict=True))
            assert error < 1e-12
        plan = plan_buckets(SHAPES, ranks, bucket)
        assert {of_rank[case][2] for of_rank in results} == {3 * 2 * len(plan)}
        # Every row that its owner does not hold goes there and comes back, 8 bytes an element.
        moved = sum(
            (SHAPES[i][0] - shard_rows(SHAPES[i][0], ranks)[owner]) * SHAPES[i][1] for b in plan for i, owner in b
        )
        assert sum(of_rank[case][1] for of_rank in results) == 3 * 2 * 8 * moved


def test_equals_torch_bit_for_bit_where_it_iterates_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "iteration_dtype", lambda parameter: torch.bfloat16)
    ours = [torch.nn.Parameter(random(shape, i).float()) for i, shape in enumerate(SHAPES)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon(ours, **SETTINGS, group=None, ledger=Ledger())
    two = torch.optim.Muon(theirs, **SETTINGS)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(a.shape, 100 * step + i).float()
            b.grad = a.grad.clone()
        one.step()
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    buffers = [
        (one.state[a]["momentum_buffer"], two.state[b]["momentum_buffer"]) for a, b in zip(ours, theirs, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in buffers)


def test_the_dtype_of_the_iteration_follows_the_weights() -> None:
    assert muon.iteration_dtype(torch.empty(1, 1, dtype=torch.float64)) == torch.float64
    assert muon.iteration_dtype(torch.empty(1, 1)) == torch.float32


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_singular_values_come_to_lie_around_one(rows: int, columns: int, seed: int) -> None:
    q, _ = torch.linalg.qr(random((max(rows, columns), min(rows, columns)), seed))
    scales = torch.linspace(1.0, 0.2, min(rows, columns), dtype=torch.float64)
    matrix = q * scales if rows >= columns else (q * scales).T
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_zero_gradient_leaves_all_but_the_decay() -> None:
    matrix = torch.nn.Parameter(random((4, 3), 0))
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    Muon([matrix], **SETTINGS, group=None, ledger=Ledger()).step()
    assert torch.equal(matrix, before * (1 - 0.05 * 0.1))


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    still, moved = (torch.nn.Parameter(random((4, 3), seed)) for seed in (0, 1))
    before = still.detach().clone()
    moved.grad = torch.ones_like(moved)
    optimizer = Muon([still, moved], **SETTINGS, group=None, ledger=Ledger())
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 9))
def test_rows_are_cut_as_torch_cuts(rows: int, ranks: int) -> None:
    sizes = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    assert shard_rows(rows, ranks) == sizes + [0] * (ranks - len(sizes))


@settings(deadline=None)
@given(shapes_lists, st.integers(1, 8), st.integers(1, 3000))
def test_buckets_hold_every_matrix_once_and_little_at_a_rank(
    shapes: list[tuple[int, int]], ranks: int, limit: int
) -> None:
    buckets = plan_buckets(shapes, ranks, limit)
    assert sorted(index for bucket in buckets for index, _ in bucket) == list(range(len(shapes)))
    for bucket in buckets:
        assert bucket
        for rank in range(ranks):
            sizes = [shapes[i][0] * shapes[i][1] for i, owner in bucket if owner == rank]
            assert sum(sizes) <= limit or len(sizes) == 1


@settings(deadline=None)
@given(shapes_lists, st.integers(1, 8))
def test_work_is_balanced_to_within_one_matrix(shapes: list[tuple[int, int]], ranks: int) -> None:
    for bucket in plan_buckets(shapes, ranks, 10**9):
        work = [sum(flops(shapes[i]) for i, owner in bucket if owner == rank) for rank in range(ranks)]
        assert max(work) - min(work) <= max(flops(shapes[i]) for i, _ in bucket)


def test_equal_matrices_go_round_robin() -> None:
    [bucket] = plan_buckets([(4, 4)] * 6, 3, 10**9)
    assert bucket == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]
