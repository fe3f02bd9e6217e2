"""SwiGLU in plain torch, against what it is by definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import leaves

from armillary.kernels.norm import CPU_ROWS
from armillary.kernels.swiglu import swiglu

SHAPES = [(3,), (1, 1, 8), (2, 5, 6), (CPU_ROWS - 1, 4), (CPU_ROWS, 4), (CPU_ROWS + 1, 4), (2, CPU_ROWS, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_its_gradients(shape: tuple[int, ...]) -> None:
    gate, up, pull = leaves(shape, shape, shape)
    got = torch.autograd.grad(swiglu(gate, up), (gate, up), pull)
    want = torch.autograd.grad(F.silu(gate) * up, (gate, up), pull)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_it_is_plain_swiglu() -> None:
    gate, up, pull = leaves((300, 32), (300, 32), (300, 32), dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    got = torch.autograd.grad(swiglu(gate, up), (gate, up), pull)
    torch.testing.assert_close(got, torch.autograd.grad(F.silu(gate) * up, (gate, up), pull), rtol=2**-7, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_gradcheck(shape: list[int]) -> None:
    assert torch.autograd.gradcheck(swiglu, tuple(leaves(shape, shape)))


def test_strided_inputs_and_expanded_gradients() -> None:
    gate, up = leaves((6, 5, 4), (6, 5, 4))
    ours = torch.autograd.grad(swiglu(gate.transpose(0, 2), up.transpose(0, 2)).sum(), (gate, up))
    truth = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_inputs_that_differ_are_refused() -> None:
    gate, up = leaves((2, 4), (4,))
    with pytest.raises(ValueError, match=r"gate \(2, 4\).*up \(4,\)"):
        swiglu(gate, up)
    with pytest.raises(ValueError, match=r"float64 and up \(2, 4\) torch.float32"):
        swiglu(gate, gate.float())
