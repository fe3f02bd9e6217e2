"""Every element of a parameter is where DeepSpeed has it, and comes to the rows that want it, and back."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.comm.ledger import Ledger
from armillary.train.deepspeed.layout import overlap, pieces_of_each, pieces_of_one_flat, redistribute

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def read_back(pieces, flats):
    """The parameters that pieces of the ranks' flat buffers make up."""
    return [
        [x for flat, (a, b), at in zip(flats, it.spans, it.positions, strict=True) for x in flat[at : at + b - a]]
        for it in pieces
    ]


@given(SIZES, st.integers(1, 5), st.integers(0, 3))
def test_pieces_of_one_flat_buffer(sizes, num_ranks, padding):
    offsets = [0, *itertools.accumulate(sizes)][:-1]
    part = -(-(sum(sizes) + padding) // num_ranks)
    whole = list(range(sum(sizes))) + [-1] * (part * num_ranks - sum(sizes))
    flats = [whole[rank * part : (rank + 1) * part] for rank in range(num_ranks)]
    expected = [whole[first : first + size] for first, size in zip(offsets, sizes, strict=True)]
    assert read_back(pieces_of_one_flat(sizes, offsets, part, num_ranks), flats) == expected


@given(SIZES, st.integers(1, 5))
def test_pieces_of_each_parameter(sizes, num_ranks):
    flats = [[] for _ in range(num_ranks)]
    expected = []
    for number, size in enumerate(sizes):
        part = -(-size // num_ranks)
        expected.append([(number, i) for i in range(size)])
        padded = expected[-1] + [None] * (part * num_ranks - size)
        for rank, flat in enumerate(flats):
            flat.extend(padded[rank * part : (rank + 1) * part])
    assert read_back(pieces_of_each(sizes, num_ranks), flats) == expected


@given(*[st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: tuple(sorted(pair)))] * 2)
def test_overlap(a, b):
    first, last = overlap(a, b)
    assert list(range(first, last)) == sorted(set(range(*a)) & set(range(*b)))


def there_and_back(rank: int, cases: list) -> None:
    """Fills what the spans say, moves it, and looks at every element."""
    facts = {"group": torch.distributed.group.WORLD, "ledger": Ledger(), "purpose": "test"}
    for sources, targets in cases:
        outgoing = [torch.arange(*spans[rank]) + 100 * k for k, spans in enumerate(sources)]
        incoming = [torch.full((spans[rank][1] - spans[rank][0],), -1) for spans in targets]
        redistribute(sources, targets, outgoing, incoming, **facts)
        for k, (spans, tensor) in enumerate(zip(targets, incoming, strict=True)):
            assert tensor.tolist() == [100 * k + i for i in range(*spans[rank])]
        moved = sum(
            8 * (b - a)
            for ours, wanted in zip(sources, targets, strict=True)
            for other in range(3)
            if other != rank
            for a, b in [overlap(ours[rank], wanted[other])]
        )
        assert facts["ledger"].bytes() == moved
        facts["ledger"].clear()


def test_redistribute_moves_each_element_once(world):
    def spans(size: int, a: int, b: int) -> tuple:
        return tuple(itertools.pairwise((0, a, b, size)))

    edges = [(5, 0, 0), (5, 2, 3), (5, 5, 5), (5, 1, 5)]
    cases = [([spans(*s), spans(*t)], [spans(*t), spans(*s)]) for s in edges for t in edges]
    world(there_and_back, 3, cases)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_parameter_smaller_than_the_ranks(num_ranks):
    (pieces,) = pieces_of_each([1], num_ranks)
    assert pieces.spans == ((0, 1), *[(1, 1)] * (num_ranks - 1))
