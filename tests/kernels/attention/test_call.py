"""The front of attention: its gradients, buffers that are filled, folded into and added to, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from attention_cases import Case, cases, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.attention.call import Gradients, Partial, attention, backward, forward, row_dots
from armillary.kernels.attention.choice import CHOICES, choose
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile

IMPLEMENTATIONS = ("cpu", "reference")


def call(case: Case, q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Partial:
    tile = case.tile
    facts: dict[str, Any] = {"mask": tile.mask, "scale": tile.scale, "first_head": tile.first_head}
    return attention(q, k, v, tile.queries, tile.keys, implementation=implementation, **facts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(cases(longest=6))
def test_gradients_of_both_results(implementation: str, case: Case) -> None:
    """By finite differences; where a query sees nothing its log-sum-exp is -inf and has none."""
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
    if not leaves[0].numel():
        return

    def results(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(case, *inputs, implementation)  # type: ignore[arg-type]
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(results, leaves, fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_one_result_alone_may_be_used(case: Case, dtype: torch.dtype) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors(dtype)]
    got = call(case, *leaves, "cpu")  # type: ignore[arg-type]
    if not got.out.numel():
        return
    assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    d_out, d_lse = case.like(got.out, 1), case.like(got.lse, 2)
    first, second, both = (
        torch.autograd.grad(results, leaves, pulls, retain_graph=True)
        for results, pulls in (([got.out], [d_out]), ([got.lse], [d_lse]), (list(got), [d_out, d_lse]))
    )
    for a, b, c in zip(first, second, both, strict=True):
        torch.testing.assert_close((a + b).float(), c.float(), rtol=0, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(case=cases(), count=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_ring_in_parts_is_the_single_call(implementation: str, case: Case, count: int, dtype: torch.dtype) -> None:
    """The first tile begins a result in float32, the others fold into it; gradients add up in float32 buffers."""
    q, k, v = case.tensors(dtype)
    into, sums, tiles = None, Gradients(*(torch.zeros(t.shape) for t in (q, k, v))), split(case.tile, count, case.seed)
    for tile, part in tiles:
        into = forward(q, k[:, part], v[:, part], tile, into, torch.float32, implementation)
    assert into is not None
    d_out = case.like(into.out, 1)
    delta = row_dots(into.out, d_out, into.lse)
    for tile, part in tiles:
        of_tile = Gradients(sums.q, *(torch.ones(q.shape[0], len(part), *k.shape[2:]) for _ in range(2)))
        facts: dict[str, Any] = {"into": of_tile, "implementation": implementation}
        got = backward(d_out.to(dtype), q, k[:, part], v[:, part], into.lse, delta, tile, **facts)
        assert all(a is b for a, b in zip(got, of_tile, strict=True))
        sums.k[:, part], sums.v[:, part] = got.k - 1, got.v - 1  # type: ignore[index, operator]
    leaves = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    whole = call(case, *leaves, implementation)  # type: ignore[arg-type]
    torch.testing.assert_close(tuple(into), tuple(whole), rtol=1e-5, atol=1e-5)
    if whole.out.numel():
        wanted = torch.autograd.grad(whole.out, leaves, d_out.to(dtype).float())
        # delta was made from d_out before it was rounded.
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(tuple(sums), wanted, rtol=tolerance, atol=tolerance)


def test_left_out_places_are_one_causal_document_a_row() -> None:
    q, k, v = torch.randn(3, 2, 7, 4, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attention(q, k, v).out, wanted.transpose(1, 2))
    assert torch.equal(attention(q, k, v, Places.in_order(2, 7)).out, attention(q, k, v).out)


def test_any_strides() -> None:
    """Heads before tokens, channels that are not neighbours, and the gradient of a sum, which has no strides at all."""
    heads_first, channels_far, plain = torch.randn(2, 3, 5, 7), torch.randn(7, 2, 5, 3), torch.randn(2, 5, 3, 7)
    strided = [heads_first.transpose(1, 2), channels_far.permute(1, 2, 3, 0), plain]
    dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in strided]
    for inputs in (strided, dense):
        attention(*(tensor.requires_grad_() for tensor in inputs)).out.sum().backward()  # type: ignore[arg-type]
    assert strided[1].stride(-1) > 1
    q, k, v = (tensor.double().requires_grad_() for tensor in dense)
    wanted = torch.autograd.grad(attention(q, k, v, implementation="reference").out.sum(), (q, k, v))
    for ours, theirs, truth in zip(strided, dense, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours.grad, truth.float())


def test_parts_take_no_gradient() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    places = Places.in_order(1, 4)
    tile = Tile(places, places, Mask(), 1.0)
    out, lse = forward(q, k, v, tile)
    assert not out.requires_grad
    assert not any(g.requires_grad for g in backward(out, q, k, v, lse, row_dots(out, out, lse), tile))  # type: ignore


def test_delta_is_zero_where_nothing_is_seen() -> None:
    out, d_out = torch.zeros(1, 2, 1, 3), torch.full((1, 2, 1, 3), math.nan)
    d_out[:, 1] = 1
    out[:, 1] = 2
    lse = torch.tensor([[[-math.inf, 0.5]]])
    assert row_dots(out, d_out, lse, torch.full((1, 1, 2), 4.0)).tolist() == [[[0.0, 2.0]]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 1, 8)], "do not fit"),
        ([(1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)], "do not fit"),
        ([(1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 6)], "do not fit"),
        ([(4, 2, 8), (4, 2, 8), (4, 2, 8)], "do not fit"),
        ([(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)], "3 heads are not a multiple of 2 key heads"),
        ([(1, 4, 2, 8), (1, 4, 0, 8), (1, 4, 0, 8)], "not a multiple of 0 key heads"),
        ([(1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], r"\(1, 5\) \(batch, queries\), but places for \(1, 4\)"),
        ([(1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], r"\(1, 5\) \(batch, keys\), but places for \(1, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(shape) for shape in shapes), Places.in_order(1, 4))  # type: ignore[arg-type, misc]


def test_dtypes_must_be_one() -> None:
    x = torch.randn(1, 4, 2, 8)
    for q, k in ((x, x.double()), (x.long(), x.long())):
        with pytest.raises(ValueError, match="must be one floating-point dtype"):
            attention(q, k, k)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(torch.device("cpu"), torch.bfloat16, 64) is CHOICES[0]
    assert choose(torch.device("cuda"), torch.float64, 64).implementation == "reference"
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        attention(x, x, x, implementation="fast")
    monkeypatch.setenv("ARMILLARY_KERNELS", "attention=reference")
    assert torch.equal(attention(x, x, x).out, attention(x, x, x, implementation="reference").out)
