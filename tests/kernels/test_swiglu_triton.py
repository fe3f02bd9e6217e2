"""SwiGLU's Triton kernels against plain torch in float64."""

from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, kernels, leaves, results
from torch import Tensor

from armillary.kernels.swiglu import swiglu
from armillary.launch.bench_gpu.plain import plain_swiglu

interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([64, 2048]),
    st.sampled_from([1.0, 30.0]),
)
def test_swiglu_and_its_gradients(shape: list[int], dtype: torch.dtype, block: int, scale: float) -> None:
    gate, up, pull = leaves(shape, shape, shape, dtype=dtype)
    gate = (gate.detach() * scale).requires_grad_()
    with mock.patch("armillary.kernels.swiglu_triton.BLOCK", block):
        check("swiglu", swiglu, plain_swiglu, (gate, up), (pull,))


def test_any_layout_and_expanded_gradients() -> None:
    gate, up = leaves((6, 5, 40), (40, 5, 6), dtype=torch.bfloat16)
    pull = torch.ones((), device=gate.device, dtype=torch.bfloat16).expand(6, 5, 20)

    def of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a[..., ::2], b.transpose(0, 2)[..., 20:]

    check("swiglu", lambda *a: swiglu(*of(*a)), lambda *a: plain_swiglu(*of(*a)), (gate, up), (pull,))


def test_far_out_it_is_zero_or_the_product() -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30], device=DEVICE).requires_grad_()
    up = torch.full((6,), 3.0, device=DEVICE).requires_grad_()
    with kernels("swiglu=triton"):
        out, d_gate, d_up = results(swiglu, (gate, up), (torch.ones(6, device=DEVICE),))
    assert out.tolist() == [0, 0, 0, 0, 600, torch.tensor(1e30).mul(3).item()]
    assert d_gate.tolist() == [0, 0, 1.5, 1.5, 3, 3]
    assert d_up.tolist() == [0, 0, 0, 0, 200, torch.tensor(1e30).item()]
