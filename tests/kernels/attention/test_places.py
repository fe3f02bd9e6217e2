"""Runs are another way to write positions and documents: whatever the order of tokens, they give back both."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tile_cases import grids

from armillary.kernels.attention.places import LENGTH, ROW, START, STEP, Places


@settings(max_examples=300, deadline=None)
@given(grids())
@example((np.zeros((2, 0), np.int64), np.zeros((2, 0), np.int64)))
@example((np.zeros((0, 5), np.int64), np.zeros((0, 5), np.int64)))
@example((np.array([[5, 3, 1, 3, 5, 6, 8, 10]]), np.zeros((1, 8), np.int64)))
def test_give_back_any_positions_and_documents(grid: Any) -> None:
    positions, documents = grid
    places = Places.of(positions, documents)
    assert (places.batch, places.seq) == positions.shape
    for got, want in ((places.positions(), positions), (places.documents(), documents)):
        assert got.dtype == torch.int64
        assert got.shape == positions.shape
        assert np.array_equal(got.numpy(), want)


@settings(max_examples=200, deadline=None)
@given(grids())
def test_runs_hold_each_token_once(grid: Any) -> None:
    places = Places.of(*grid)
    held = [(row, token) for row, start, length, *_ in places.runs.tolist() for token in range(start, start + length)]
    # Sorted by row and start, so the list of all is in order too.
    assert held == [(row, token) for row in range(places.batch) for token in range(places.seq)]
    assert (places.runs[:, LENGTH] >= 1).all()
    assert (places.runs[:, STEP] >= 1).all()
    # Fewer than three tokens show no step of their own.
    assert (places.runs[places.runs[:, LENGTH] < 3, STEP] == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_packed_documents_are_a_run_each(rows: list[list[int]]) -> None:
    seq = max(map(sum, rows))
    rows = [[*lengths, seq - sum(lengths)] if sum(lengths) < seq else lengths for lengths in rows]
    runs = Places.packed(rows).runs
    expected = [
        (row, start, n, 0, 1, document)
        for row, lengths in enumerate(rows)
        for document, (start, n) in enumerate(zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False))
    ]
    assert [tuple(run) for run in runs.tolist()] == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(2, 9), st.data())
def test_shares_of_a_ring_are_few_runs(ranks: int, length: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    chunks = np.arange(2 * ranks * length).reshape(2 * ranks, length)
    zigzag = Places.of(np.concatenate([chunks[rank], chunks[-1 - rank]])[None])
    assert len(zigzag.runs) == (1 if rank == ranks - 1 else 2)
    striped = Places.of(np.arange(rank, ranks * (length + 1), ranks)[None])
    assert striped.runs.tolist() == [[0, 0, length + 1, rank, ranks, 0]]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 9, 8, 7], [0, 1, 2, 10, 20, 21, 22], [4, 5, 6, 2, 3, 4]])
def test_a_joint_is_not_torn_from_the_run_after_it(order: list[int]) -> None:
    """Steps of one token between two stretches: both stretches stay whole."""
    lengths = Places.of(np.array([order])).runs[:, LENGTH].tolist()
    assert lengths in ([4, 1, 1, 1], [3, 1, 3], [3, 3])


@settings(max_examples=200, deadline=None)
@given(grids(), grids())
def test_keys_are_equal_for_equal_places_only(one: Any, other: Any) -> None:
    alike = all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert Places.of(*one).key == Places.of(*(array.copy() for array in one)).key
    assert (Places.of(*one).key == Places.of(*other).key) == alike


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.integers(0, 9), st.integers(0, 5), st.integers(1, 4))
def test_in_order(batch: int, seq: int, start: int, step: int) -> None:
    places = Places.in_order(batch, seq, start, step)
    positions = np.tile(start + step * np.arange(seq), (batch, 1))
    assert np.array_equal(places.positions().numpy(), positions)
    assert not places.documents().any()
    assert len(places.runs) == (batch if seq else 0)
    if step == 1 or seq > 2:
        assert places.key == Places.of(positions).key
    if batch and seq:
        assert places.in_one_piece == (start == 0 and step == 1)


@settings(max_examples=200, deadline=None)
@given(grids(longest=3).filter(lambda grid: grid[0].size))
def test_in_one_piece_means_what_it_says(grid: Any) -> None:
    positions, documents = grid
    plain = (positions == np.arange(positions.shape[1])).all() and (documents == documents[:, :1]).all()
    assert Places.of(positions, documents).in_one_piece == plain


@settings(max_examples=200, deadline=None)
@given(grids(batch=1, longest=4), st.integers(1, 3), st.integers(0, 2))
def test_rows_that_are_alike(grid: Any, batch: int, moved: int) -> None:
    """Rows of the same runs and positions; their documents may be called anything."""
    positions, documents = (np.repeat(array, batch, axis=0) for array in grid)
    documents = documents + np.arange(batch)[:, None]
    assert Places.of(positions, documents).rows_alike
    positions[-1] += moved
    assert Places.of(positions, documents).rows_alike == (moved == 0 or batch == 1 or positions.size == 0)


@settings(max_examples=100, deadline=None)
@given(grids(), st.integers(0, 2**31))
def test_picked_and_joined(grid: Any, seed: int) -> None:
    places = Places.of(*grid)
    chosen = np.random.default_rng(seed).random(places.seq) < 0.5
    parts = [places.picked(chosen), places.picked(~chosen)]
    order = np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])
    joined = Places.joined(parts)
    assert (joined.batch, joined.seq) == (places.batch, places.seq)
    assert np.array_equal(joined.positions().numpy(), grid[0][:, order])
    assert np.array_equal(joined.documents().numpy(), grid[1][:, order])
    assert places.picked(chosen) is places.picked(chosen.copy())
    assert places.picked(np.ones(places.seq, bool)) is places


def test_parts_of_other_batches_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"parts of \[1, 2\] rows"):
        Places.joined([Places.in_order(1, 3), Places.in_order(2, 3)])


def test_tensors_and_narrow_integers() -> None:
    positions = np.array([[0, 1, 2, 0, 1]])
    expected = Places.of(positions, [[0, 0, 0, 1, 1]]).key
    for kind in (np.int32, np.uint8, np.int64):
        assert Places.of(positions.astype(kind), np.array([[0, 0, 0, 1, 1]], kind)).key == expected
    assert Places.of(torch.tensor(positions), torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)).key == expected


def test_what_is_refused() -> None:
    good = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions count from 0, but one is -2"):
        Places.of([[0, -2]])
    with pytest.raises(ValueError, match="at most 1073741824"):
        Places.of([[0, 2**30 + 1]])
    with pytest.raises(ValueError, match="differ in shape"):
        Places.of(good, good[:, :2])
    # Stands for a GPU's tensor: not on the CPU.
    for arguments in ((good.to("meta"),), (good, good.to("meta"))):
        with pytest.raises(ValueError, match="data of the host"):
            Places.of(*arguments)


def test_what_is_derived_is_made_once() -> None:
    places = Places.in_order(2, 3)
    assert places.positions() is places.positions()
    assert places.derived("name", list) is places.derived("name", dict)
    assert places.runs[:, [ROW, START]].tolist() == [[0, 0], [1, 0]]
