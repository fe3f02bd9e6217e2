"""Triton's attention kernels in the interpreter, against the float64 truth on any call."""

import os

import interpreter
import torch
from attention_fuzz import Case, cases, check, run
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention.call import Gradients, attention, backward, forward, row_dots
from armillary.kernels.attention.configs import BlockConfig
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile

interpreter.install()
from armillary.kernels.attention import flash_triton  # noqa: E402

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
CALLS = int(os.environ.get("FUZZ_CALLS", "150"))
"""A fifth of a second each, forward and backward; a night takes FUZZ_CALLS=100000."""


@settings(max_examples=CALLS, deadline=None)
@given(dtype=DTYPES, case=cases())
def test_any_call(dtype: torch.dtype, case: Case) -> None:
    check(case, dtype, flash_triton)


@settings(max_examples=10, deadline=None)
@given(dtype=DTYPES, case=cases())
def test_the_same_bits_every_time(dtype: torch.dtype, case: Case) -> None:
    for first, second in zip(run(case, dtype, flash_triton), run(case, dtype, flash_triton), strict=True):
        assert torch.equal(first, second)


def test_the_front_reaches_it() -> None:
    """`attention` with its shipped blocks, differentiable in both results, against the CPU path."""
    places = Places.packed([[70, 50]])
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 120, 4, 48), (1, 120, 2, 48), (1, 120, 2, 48))
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    pulls = [torch.randn(1, 120, 4, 48, generator=generator), torch.randn(1, 4, 120, generator=generator)]
    results = []
    for name in ("triton", "cpu"):
        got = attention(*leaves, places, mask=Mask(window=40), implementation=name)
        results.append([*got, *torch.autograd.grad(got, leaves, pulls)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_a_ring_of_tiles_is_one_call() -> None:
    """Keys in three shards, one of them striped: folded forward, added backward into float32 buffers."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, d_out = (torch.randn(1, 48, 2, 16, generator=generator) for _ in range(4))
    places = Places.in_order(1, 48)
    whole = Tile(places, places, Mask(), 0.25)
    out, lse = forward(q, k, v, whole, implementation="triton")
    delta = row_dots(out, d_out, lse)
    once = backward(d_out, q, k, v, lse, delta, whole, implementation="triton")
    shards = [range(17), range(17, 48, 2), range(18, 48, 2)]
    partial, sums = None, Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    tiles = [(Tile(places, Places.of([list(s)]), Mask(), 0.25), list(s)) for s in shards]
    for tile, keys in tiles:
        partial = forward(q, k[:, keys], v[:, keys], tile, partial, implementation="triton")
    assert partial is not None
    torch.testing.assert_close(partial.out, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(partial.lse, lse, rtol=0, atol=1e-6)
    for tile, keys in tiles:
        into = Gradients(sums.q, torch.zeros_like(k[:, keys]), torch.zeros_like(v[:, keys]))
        got = backward(d_out, q, k[:, keys], v[:, keys], lse, delta, tile, into, implementation="triton")
        assert got.q is sums.q
        sums.k[:, keys], sums.v[:, keys] = got.k, got.v
    for got, want in zip(sums, once, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


def test_keys_and_values_may_be_a_launch_each() -> None:
    """Where a head is too long for both sums at once."""
    places, config = Places.in_order(1, 33), BlockConfig(16, 16, 4, 2, split=True)
    for into in (True, False):
        case = Case(Tile(places, places, Mask(), 0.3), 2, 2, 24, config, into, 0)
        check(case, torch.bfloat16, flash_triton)
