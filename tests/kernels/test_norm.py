"""RMSNorm, and the SwiGLU that walks its rows the same way, against what they are by definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.norm import CPU_ROWS, rms_norm
from armillary.kernels.swiglu import swiglu

SHAPES = [(3,), (1, 1, 8), (2, 5, 6), (CPU_ROWS - 1, 4), (CPU_ROWS, 4), (CPU_ROWS + 1, 4), (2, CPU_ROWS, 3, 4)]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


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
    gate, up = leaves((6, 5, 4), (6, 5, 4))
    ours = torch.autograd.grad(swiglu(gate.transpose(0, 2), up.transpose(0, 2)).sum(), (gate, up))
    truth = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_its_gradients(shape: tuple[int, ...]) -> None:
    gate, up, pull = leaves(shape, shape, shape)
    got = torch.autograd.grad(swiglu(gate, up), (gate, up), pull)
    want = torch.autograd.grad(F.silu(gate) * up, (gate, up), pull)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_swiglu_in_bfloat16_is_plain_swiglu() -> None:
    gate, up, pull = leaves((300, 32), (300, 32), (300, 32), dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    got = torch.autograd.grad(swiglu(gate, up), (gate, up), pull)
    torch.testing.assert_close(got, torch.autograd.grad(F.silu(gate) * up, (gate, up), pull), rtol=2**-7, atol=1e-3)
