"""Attention against its float64 reference, on any documents and any order of positions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.attention import Places, attention, reference, visible

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, documents in runs, positions that restart in each, and a shuffle of the tokens or none."""
    batch, seq, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 19)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    starts = torch.rand(batch, seq, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    starts[:, 0] = True
    index = torch.arange(seq).expand(batch, seq)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    documents = (starts.cumsum(1) - 1).int()
    if draw(st.booleans()):
        order = torch.randperm(seq, generator=generator)
        positions, documents = positions[:, order], documents[:, order]
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), draw(st.sampled_from([2, 6, 16]))
    q, k, v = (
        torch.randn(batch, seq, h, head_dim, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )
    return {"q": q, "k": k, "v": v, "positions": positions, "documents": documents}


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(list(TOLERANCE)))
def test_equals_the_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = (case[name].to(dtype) for name in "qkv")
    places = Places.of(case["positions"], case["positions"], case["documents"])
    out = attention(q, k, v, places)
    assert out.dtype == dtype
    assert out.shape == q.shape
    truth = reference(q, k, v, case["positions"], case["documents"])
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(cases())
def test_gradients_equal_the_references(case: dict[str, Any]) -> None:
    leaves = [case[name].clone().requires_grad_() for name in "qkv"]
    weight = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = Places.of(case["positions"], case["positions"], case["documents"])
    q, k, v = leaves
    ours = torch.autograd.grad(attention(q, k, v, places), leaves, weight)
    truth = torch.autograd.grad(reference(q, k, v, case["positions"], case["documents"]), leaves, weight)
    for got, want in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_no_query_sees_another_document_or_the_future() -> None:
    positions, documents = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(positions, documents)[0, 0].int().tolist() == expected


@pytest.mark.parametrize("hidden", [3, 4])
def test_what_is_not_seen_does_not_count(hidden: int) -> None:
    """Token 2 ends its document: garbage in the next one, or later in its own, changes nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64) for _ in range(3))
    positions = torch.tensor([[0, 1, 2, 3, 0]])
    places = Places.of(positions, positions, torch.tensor([[0, 0, 0, 0, 1]]))
    before = attention(q, k, v, places)[:, :3]
    k[:, hidden], v[:, hidden] = 1e6, 1e6
    assert torch.equal(attention(q, k, v, places)[:, :3], before)


def test_places_know_when_no_mask_is_needed() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    count, zeros = torch.arange(6).expand(2, 6), torch.zeros(2, 6, dtype=torch.int32)
    assert Places.of(tokens, None, None).ordered
    assert Places.of(tokens, count, zeros).ordered
    assert Places.of(tokens, count, torch.tensor([[3], [5]]).expand(2, 6)).ordered
    split = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, 6)
    assert not Places.of(tokens, count, split).ordered
    assert not Places.of(tokens, None, split).ordered
    assert not Places.of(tokens, count.flip(1), zeros).ordered


def test_the_mask_is_made_once() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    places = Places.of(tokens, None, torch.tensor([[0, 0, 1, 1]]))
    bias: Tensor = places.bias(torch.float32)
    assert places.bias(torch.float32) is bias
    assert places.bias(torch.float64).dtype == torch.float64
