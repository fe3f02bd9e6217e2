"""Packing loses nothing and crosses nothing; every sequence has one place."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.data.packing import (
    IGNORE,
    Layout,
    Sequence,
    assign,
    count_sequences,
    cut,
    lay_out,
    placeholder,
    shuffled,
)

END = 60_000
LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=30)


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are all different but for the ends of documents, and where documents start."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[1:] - 1] = END
    return tokens, offsets


def epoch(lengths: list[int], length: int, seed: int | None) -> tuple[Layout, list[Sequence]]:
    tokens, offsets = corpus(lengths)
    order = None if seed is None else shuffled(len(lengths), seed)
    layout = lay_out(offsets[:-1], np.diff(offsets), order)
    count = count_sequences(sum(lengths), length)
    return layout, [cut(tokens, layout, i, length, END) for i in range(count)]


@given(lengths=LENGTHS, length=st.integers(1, 40), seed=st.none() | st.integers(0, 9))
def test_an_epoch_holds_every_token_and_every_label_once(lengths: list[int], length: int, seed: int | None) -> None:
    tokens, offsets = corpus(lengths)
    wanted: Counter[tuple[int, int]] = Counter()
    for begin, end in pairwise(offsets):
        ids = tokens[begin:end].tolist()
        wanted.update(zip(ids, [*ids[1:], IGNORE], strict=True))
    _, sequences = epoch(lengths, length, seed)
    found = Counter((int(t), int(label)) for s in sequences for t, label in zip(s.tokens, s.labels, strict=True))
    padding = len(sequences) * length - sum(lengths)
    assert 0 <= padding < length
    assert found == wanted + Counter({(END, IGNORE): padding})


@given(lengths=LENGTHS, length=st.integers(1, 40), seed=st.none() | st.integers(0, 9))
def test_documents_and_positions_mark_the_boundaries(lengths: list[int], length: int, seed: int | None) -> None:
    layout, sequences = epoch(lengths, length, seed)
    tokens, _ = corpus(lengths)
    in_order = np.concatenate([tokens[s : s + n] for s, n in zip(layout.starts, np.diff(layout.bounds), strict=True)])
    owners = np.repeat(np.arange(len(lengths)), np.diff(layout.bounds))
    for index, s in enumerate(sequences):
        begin = index * length
        num = min(length, len(in_order) - begin)
        assert s.tokens[:num].tolist() == in_order[begin : begin + num].tolist()
        assert s.documents[:num].tolist() == (owners[begin : begin + num] - owners[begin]).tolist()
        if num < length:  # padding is a document of its own
            assert set(s.documents[num:].tolist()) == {s.documents[num - 1] + 1}
            assert set(s.labels[num:].tolist()) == {IGNORE}
        starts = np.flatnonzero(np.diff(s.documents, prepend=-1))
        for a, b in zip(starts, [*starts[1:], length], strict=True):
            assert s.positions[a:b].tolist() == list(range(b - a))


def test_the_label_at_the_cut_is_the_next_token() -> None:
    _, (first, second) = epoch([6], 4, None)
    assert first.tokens.tolist() == [0, 1, 2, 3]
    assert first.labels.tolist() == [1, 2, 3, 4]
    assert second.tokens.tolist() == [4, END, END, END]
    assert second.labels.tolist() == [END, IGNORE, IGNORE, IGNORE]
    assert second.positions.tolist() == [0, 1, 0, 1]
    assert second.documents.tolist() == [0, 0, 1, 1]


def test_arrays_are_what_torch_takes() -> None:
    _, sequences = epoch([3, 5], 4, 0)
    for s in (*sequences, placeholder(7)):
        assert [a.dtype for a in s] == [np.int64, np.int64, np.int64, np.int32]
        assert all(a.flags.writeable and a.flags.c_contiguous and a.ndim == 1 for a in s)
    assert placeholder(7).tokens.tolist() == [7]
    assert placeholder(7).labels.tolist() == [IGNORE]


@given(count=st.integers(0, 300), key=st.lists(st.integers(0, 2**70), min_size=1, max_size=4))
def test_shuffling_is_a_permutation_fixed_by_its_key(count: int, key: list[int]) -> None:
    order = shuffled(count, *key)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == shuffled(count, *key).tolist()


def test_shuffling_never_changes() -> None:
    """A run resumed with another numpy must see the same order."""
    assert shuffled(8, 0, 1, 2).tolist() == [6, 7, 2, 3, 0, 5, 1, 4]
    assert shuffled(1000, 1).tolist() != shuffled(1000, 2).tolist()


@given(num=st.integers(0, 70), num_micro_batches=st.integers(1, 6), num_ranks=st.integers(1, 9))
def test_every_sequence_has_one_place_and_places_are_even(num: int, num_micro_batches: int, num_ranks: int) -> None:
    shares = [assign(num, num_micro_batches, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(i for ranges in shares for r in ranges for i in r) == list(range(num))
    counts = [len(r) for ranges in shares for r in ranges]
    assert len(counts) == num_micro_batches * num_ranks
    assert max(counts) - min(counts) <= 1
    totals = [sum(map(len, ranges)) for ranges in shares]
    assert max(totals) - min(totals) <= 1
