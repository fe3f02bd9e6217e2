"""RMSNorm in plain torch, alone and after a sum, against what it is by definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import leaves, results

from armillary.kernels.norm import CPU_ROWS, add_rms_norm, rms_norm
from armillary.launch.bench_gpu.plain import plain_norm, plain_norm_of_sum

SHAPES = [(3,), (1, 1, 8), (2, 5, 6), (CPU_ROWS - 1, 4), (CPU_ROWS, 4), (CPU_ROWS + 1, 4), (2, CPU_ROWS, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    x, weight, pull = leaves(shape, shape[-1:], shape)
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), pull)
    want = torch.autograd.grad(plain_norm(x, weight, 1e-5), (x, weight), pull)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_casts_in_llamas_order(dtype: torch.dtype) -> None:
    x, weight = leaves((70, 48), (48,), dtype=dtype)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert torch.equal(out, plain_norm(x, weight, 1e-5))


def test_norm_of_bfloat16_has_gradients_computed_in_float32() -> None:
    x, weight, pull = leaves((400, 64), (64,), (400, 64), dtype=torch.bfloat16)
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), pull)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, pull)]
    want = torch.autograd.grad(plain_norm(wide[0], wide[1], 1e-5), wide[:2], wide[2])
    for ours, truth in zip(got, want, strict=True):
        # One rounding to bfloat16, no more: summing 400 rows in bfloat16 would be off by far.
        torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(1e-8, 1.0))
def test_norm_gradcheck(shape: list[int], eps: float) -> None:
    x, weight = leaves(tuple(shape), (shape[-1],))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps), (x, weight))


def test_strided_inputs_and_expanded_gradients() -> None:
    base, weight = leaves((6, 5, 4), (6,))
    x = base.transpose(0, 2)
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), (base, weight))
    want = torch.autograd.grad(plain_norm(x, weight, 1e-5).sum(), (base, weight))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["both", "norm", "sum"])
def test_sum_and_norm_and_their_gradients(shape: tuple[int, ...], part: str) -> None:
    inputs, pulls = leaves(shape, shape, shape[-1:]), leaves(shape, shape, seed=1)
    pulled = [None if part == "sum" else pulls[0], None if part == "norm" else pulls[1]]
    got = results(lambda *a: add_rms_norm(*a, 1e-5), inputs, pulled)
    want = results(lambda *a: plain_norm_of_sum(*a, 1e-5), inputs, pulled)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(1e-8, 1.0))
def test_sum_and_norm_gradcheck(shape: list[int], eps: float) -> None:
    inputs = leaves(shape, shape, shape[-1:])
    assert torch.autograd.gradcheck(lambda a, b, w: add_rms_norm(a, b, w, eps), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_reads_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = leaves((70, 48), (70, 48), (48,), dtype=dtype)
    out, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, weight, 1e-5))


def test_gradients_of_sum_and_norm_meet_before_rounding() -> None:
    inputs, pulls = (leaves(*s, dtype=torch.bfloat16) for s in ([(90, 64), (90, 64), (64,)], [(90, 64), (90, 64)]))
    got = results(lambda *a: add_rms_norm(*a, 1e-5), inputs, pulls)
    wide = [t.detach().double().requires_grad_() for t in ((inputs[0] + inputs[1]), inputs[2])]
    want = results(lambda a, w: (plain_norm(a, w, 1e-5), a + 0), wide, [pull.double() for pull in pulls])
    assert torch.equal(got[2], got[3])
    torch.testing.assert_close(got[3].double(), want[2], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(got[4].double(), want[3], rtol=2**-8, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, residual, weight = leaves((3, 8), (3, 8), (8,))
    out, total = add_rms_norm(x.detach(), residual, weight.detach(), 1e-5)
    (out.sum() + total.sum()).backward()
    assert residual.grad is not None
    assert x.grad is weight.grad is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = leaves((3, 8), (8,))
    with pytest.raises(ValueError, match=r"weight \(8,\) does not fit rows of \(3, 4\)"):
        rms_norm(x[:, :4], weight, 1e-5)
    with pytest.raises(ValueError, match=r"x \(3, 8\) .* and residual \(8,\) .* must be alike"):
        add_rms_norm(x, x[0], weight, 1e-5)
    with pytest.raises(ValueError, match=r"float64 and residual \(3, 8\) torch.float32 must be alike"):
        add_rms_norm(x, x.float(), weight, 1e-5)
