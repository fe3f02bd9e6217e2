"""Which part of each parameter a tensor rank holds: for any shape, parts tile the whole and heads stay with theirs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import Case, make

from armillary.parallel.held import part_of
from armillary.parallel.pipeline.cut_model import cut_to_stage
from armillary.parallel.tensor.cut_model import cut_to_rank
from armillary.parallel.tensor.cuts import first_kv_head, head_parts, hidden_shape, tensor_cuts

HEAD = 4


@st.composite
def heads_and_degree(draw: st.DrawFn) -> tuple[int, int, int]:
    kv_heads, ratio = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return kv_heads * ratio, kv_heads, draw(st.integers(1, kv_heads * ratio))


@given(heads_and_degree())
def test_heads_are_whole_local_groups_in_order(shape):
    num_heads, kv_heads, degree = shape
    queries, keys = head_parts(num_heads, kv_heads, degree)
    assert [sum(pair) for pair in queries[:-1]] == [first for first, _ in queries[1:]]
    assert queries[0][0] == 0
    assert sum(queries[-1]) == num_heads
    for (first, count), (kv_first, kv_count) in zip(queries, keys, strict=True):
        assert count > 0
        assert kv_count > 0
        ratio, over = divmod(count, kv_count)
        assert over == 0
        # The local query head i uses the local key head i // ratio, which must be its own in the whole model.
        for head in range(count):
            assert (first + head) // (num_heads // kv_heads) == kv_first + head // ratio


@given(heads_and_degree())
def test_no_rank_has_more_than_its_share_and_one(shape):
    """Of key heads where there are enough, else of the query heads of the key head with the fewest ranks."""
    num_heads, kv_heads, degree = shape
    queries, keys = head_parts(num_heads, kv_heads, degree)
    if degree <= kv_heads:
        assert max(count for _, count in keys) == -(-kv_heads // degree)
    else:
        assert max(count for _, count in queries) == -(-(num_heads // kv_heads) // (degree // kv_heads))


@settings(max_examples=30, deadline=None)
@given(
    heads_and_degree(),
    st.integers(1, 40),
    st.integers(3, 40),
    st.booleans(),
    st.booleans(),
)
def test_parts_tile_every_parameter(shape, hidden, vocab, tied, extras):
    num_heads, kv_heads, degree = shape
    case = Case(
        heads=(num_heads, kv_heads), hidden=max(hidden, degree), vocab=vocab, tied=tied, qk_norm=extras, qkv_bias=extras
    )
    model = make(case, torch.float32)
    cuts = tensor_cuts(model, degree)
    assert list(cuts) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        cut = cuts[name]
        assert cut.shape == parameter.shape
        assert len(cut.parts) == degree
        counts = torch.zeros(cut.shape)
        for rank in filter(cut.speaks, range(degree)):
            part_of(counts, cut.box(rank)).add_(1)
        assert bool((counts == 1).all()), name
        if degree > 1:
            everywhere = name.endswith("norm.weight") or ((".key." in name or ".value." in name) and kv_heads == 1)
            assert everywhere == (cut.holders(0) == tuple(range(degree))), name


def test_what_is_held_alike():
    cuts = tensor_cuts(make(Case(heads=(6, 2)), torch.float32), 5)
    assert cuts["blocks.0.attention.key.weight"].parts == ((0, 4), (0, 4), (4, 4), (4, 4), (4, 4))
    assert cuts["blocks.0.attention.query.weight"].parts == ((0, 4), (4, 8), (12, 4), (16, 4), (20, 4))
    assert [first_kv_head(cuts, rank, HEAD) for rank in range(5)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("hidden", "sizes"),
    [(14336, (4776, 4776, 4784)), (32, (10, 11, 11)), (1001, (333, 334, 334))],
)
def test_channels_stay_in_eights_where_there_are_many(hidden, sizes):
    cuts = tensor_cuts(make(Case(heads=(6, 2), hidden=hidden), torch.float32), 3)
    for name in ("gate", "up", "down"):
        assert tuple(size for _, size in cuts[f"blocks.1.ffn.{name}.weight"].parts) == sizes


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case(heads=(4, 2)),
            "plan.tp = 5: tensor ranks share out query heads, and model.num_heads = 4; set plan.tp to 4",
        ),
        (Case(heads=(6, 2), hidden=3), "plan.tp = 5.*model.ffn_dim = 3; set plan.tp to 3 or less"),
    ],
)
def test_too_many_ranks_are_refused(case, message):
    with pytest.raises(ValueError, match=message):
        tensor_cuts(make(case, torch.float32), 5)


@given(st.integers(0, 5), st.integers(0, 9), st.integers(1, 6))
def test_hidden_has_room_for_every_token_and_no_row_too_many(batch, seq, degree):
    shape = hidden_shape((batch, seq), 8, degree)
    if degree == 1:
        assert shape == (batch, seq, 8)
    else:
        assert shape[1] == 8
        assert 0 <= shape[0] * degree - batch * seq < degree


@pytest.mark.parametrize(("begins", "ends", "tied"), list(itertools.product([True, False], repeat=3)))
def test_a_stage_of_a_pipeline_is_cut_as_the_whole_is(begins, ends, tied):
    case = Case(tied=tied)
    cuts = tensor_cuts(make(case, torch.float32), 3)
    stage = make(case, torch.float32)
    cut_to_stage(stage, range(1, 2), begins, ends)
    names = [name for name, _ in stage.named_parameters()]
    cut_to_rank(stage, cuts, group=SimpleNamespace(size=lambda: 3, rank=lambda: 1), ledger=None)
    assert [name for name, _ in stage.named_parameters()] == names
    for name, parameter in stage.named_parameters():
        assert parameter.is_meta
        assert parameter.shape == cuts[name].local_shape(1)
