"""The CPU path against the float64 truth, on any tile and however it is cut."""

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from attention_cases import Case, cases, split
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.attention import cpu_plan
from armillary.kernels.attention.call import CAUSAL, Gradients, Partial, backward, forward, row_dots
from armillary.kernels.attention.cpu_plan import BLOCK, plan
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.reference import reference, seen
from armillary.kernels.attention.tiles import Tile
from armillary.launch.bench_gpu.compare import nan_filled

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def never(*_: Any) -> bool:
    return False


def cuts() -> st.SearchStrategy[dict[str, Any]]:
    """Sizes at which small tiles are cut in all the ways in which large ones are."""
    sizes: dict[str, list[Any]] = {
        "BLOCK": [2, 5, 128],
        "LONG": [2, 6, 512],
        "CALL": [1, 100, 12_000],
        "KEPT": [0, 1024],
    }
    # Without looking further, by runs: else small tiles would be cut by blocks nearly always.
    sizes["_many_calls"] = [cpu_plan._many_calls, never]
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in sizes.items()})


def computed(case: Case, dtype: torch.dtype, weight_of_out: float) -> list[Tensor]:
    """out, lse and gradients of q, k and v, in buffers that held NaN; then the gradients of out and lse."""
    q, k, v = case.tensors(dtype)
    with nan_filled():
        out, lse = forward(q, k, v, case.tile, implementation="cpu")
        d_out, d_lse = case.like(out, 1) * weight_of_out, case.like(lse, 2)
        delta = row_dots(out, d_out, lse, d_lse)
        gradients = backward(d_out, q, k, v, lse, delta, case.tile, implementation="cpu")
    return [out, lse, *gradients, d_out, d_lse]  # type: ignore[list-item]


def truth_of(case: Case, dtype: torch.dtype, pulls: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in case.tensors(dtype)]
    results = reference(*leaves, case.tile)
    return [*results, *torch.autograd.grad(results, leaves, [pull.double() for pull in pulls])]


@settings(max_examples=200, deadline=None)
@given(cases(), cuts(), st.sampled_from(list(TOLERANCE)), st.sampled_from([1.0, 1.0, 0.0, 1e-25]))
def test_equals_the_reference(case: Case, sizes: dict[str, Any], dtype: torch.dtype, weight_of_out: float) -> None:
    """Also where the log-sum-exp alone has a gradient, and where that of `out` is tiny beside it."""
    with mock.patch.multiple(cpu_plan, **sizes):
        *ours, d_out, d_lse = computed(case, dtype, weight_of_out)
        again = computed(case, dtype, weight_of_out)[:5]
    for got, same, want in zip(ours, again, truth_of(case, dtype, [d_out, d_lse]), strict=True):
        assert torch.equal(got, same)
        scale = max(1.0, want[want.isfinite()].abs().max().item()) if want.isfinite().any() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert ours[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@settings(max_examples=60, deadline=None)
@given(cases(), cuts(), st.integers(1, 4), st.sampled_from([torch.float64, torch.float32]))
def test_tiles_fold_to_the_single_call(case: Case, sizes: dict[str, Any], count: int, dtype: torch.dtype) -> None:
    q, k, v = case.tensors(dtype)
    out, lse = torch.full(q.shape, math.nan, dtype=dtype), torch.full_like(q[..., 0].transpose(1, 2), -math.inf)
    tiles = split(case.tile, count, case.seed)
    with mock.patch.multiple(cpu_plan, **sizes):
        for tile, part in tiles:
            folded = forward(q, k[:, part], v[:, part], tile, into=Partial(out, lse), implementation="cpu")
            assert folded.out is out
        d_out = case.like(out, 1)
        delta = row_dots(out, d_out, lse)
        sums = [torch.zeros(t.shape, dtype=dtype) for t in (q, k, v)]
        for tile, part in tiles:
            into = Gradients(sums[0])
            found = backward(d_out, q, k[:, part], v[:, part], lse, delta, tile, into, implementation="cpu")
            sums[1][:, part], sums[2][:, part] = found.k, found.v  # type: ignore[assignment]
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    truth = reference(*leaves, case.tile)
    wanted = [*truth, *torch.autograd.grad(truth[0], leaves, d_out.double())]
    for got, want in zip([out, lse, *sums], wanted, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5 if dtype == torch.float32 else 0, atol=5 * TOLERANCE[dtype]
        )


@settings(max_examples=40, deadline=None)
@given(cases(), cuts(), st.integers(0, 99))
def test_what_a_query_does_not_see_never_counts(case: Case, sizes: dict[str, Any], choice: int) -> None:
    assume(case.tile.queries.seq > 0 and case.tile.keys.seq > 0)
    q, k, v = case.tensors()
    row, query = choice % q.shape[0], choice % q.shape[1]
    hidden = ~seen(case.tile, case.heads, case.kv_heads, q.device)[row, :, query].any(0)
    with mock.patch.multiple(cpu_plan, **sizes):
        before = forward(q, k, v, case.tile, implementation="cpu")
        k[row, hidden], v[row, hidden] = 1e5, -1e9
        after = forward(q, k, v, case.tile, implementation="cpu")
    assert torch.equal(after.out[row, query], before.out[row, query])
    assert torch.equal(after.lse[row, :, query], before.lse[row, :, query])


def pieces_of(places: Places, mask: Mask = CAUSAL, kv_heads: int = 4, keys: Places | None = None) -> list[Any]:
    return plan(Tile(places, keys or places, mask, 1.0), kv_heads)


def kinds(pieces: list[Any]) -> list[str]:
    return [part.kind for piece in pieces for part in piece.parts]


def test_what_calls_are_made() -> None:
    assert kinds(pieces_of(Places.in_order(8, 512))) == ["causal"]
    assert kinds(pieces_of(Places.in_order(8, 512), Mask(causal=False))) == ["full"]
    assert kinds(pieces_of(Places.packed([[256], [100, 156], [100, 156], [256]]))) == ["causal"] * 4
    # A ring's tiles: a later rank sees all keys, an earlier one none.
    early, late = Places.in_order(1, 512), Places.in_order(1, 512, start=512)
    assert kinds(pieces_of(late, keys=early)) == ["full"]
    assert kinds(pieces_of(early, keys=late)) == []
    # Documents of a few tokens, no two rows alike: a call a document costs more than masks over all rows.
    tiny = Places.packed([[4] * 64, [3] * 84 + [4], [2] * 128])
    assert kinds(pieces_of(tiny)) == ["masked"] * (256 // BLOCK)
    # Key heads that see the same strided blocks share their calls.
    strided = Mask(window=64, block=16, stride=4, shift=2)
    assert {piece.heads.stop - piece.heads.start for piece in pieces_of(Places.in_order(1, 512), strided)} == {1}
    even = Mask(window=64, block=16, stride=4, shift=4)
    assert {piece.heads for piece in map(_hashable_heads, pieces_of(Places.in_order(1, 512), even))} == {(0, 4)}


def _hashable_heads(piece: Any) -> Any:
    return mock.Mock(heads=(piece.heads.start, piece.heads.stop))


@settings(max_examples=60, deadline=None)
@given(cases(), cuts())
def test_pieces_hold_each_query_once_and_masks_are_no_larger_than_a_block(case: Case, sizes: dict[str, Any]) -> None:
    with mock.patch.multiple(cpu_plan, **sizes):
        pieces = plan(case.tile, case.kv_heads)
    held = torch.zeros(case.tile.queries.batch, case.kv_heads, case.tile.queries.seq, dtype=torch.int64)
    for piece in pieces:
        held[piece.rows, piece.heads, piece.queries] += 1
        for part in piece.parts:
            assert piece.queries.start <= part.queries.start < part.queries.stop <= piece.queries.stop
            assert part.kind != "masked" or part.queries.stop - part.queries.start <= sizes["BLOCK"]
    assert (held == 1).all()


@pytest.mark.parametrize("mask", [CAUSAL, Mask(window=256), Mask(window=256, sinks=64, block=64, stride=8, shift=1)])
def test_a_long_sequence_is_cut_in_linear_memory(mask: Mask) -> None:
    """Also when its tokens stand in no order."""
    for order in (np.arange(2048), np.random.default_rng(0).permutation(2048)):
        masked = [
            (p.queries.stop - p.queries.start) * cpu_plan._size(p.keys)
            for piece in pieces_of(Places.of(order[None]), mask, kv_heads=2)
            for p in piece.parts
            if p.kind == "masked"
        ]
        assert max(masked, default=0) <= BLOCK * 2048
        assert len(masked) <= 2 * 2048 // BLOCK
