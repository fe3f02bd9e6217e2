"""RMSNorm's Triton kernels against plain torch in float64."""

from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, check, kernels, leaves, results

from armillary.kernels.norm import TRITON_DIM, add_rms_norm, rms_norm
from armillary.launch.bench_gpu.plain import plain_norm, plain_norm_of_sum

interpreter.install()

DIMS = st.one_of(st.integers(1, 300), st.sampled_from([64, 80, 128, 1000, 2048]))


def tiled(programs: int, dim: int, parts: int = 1) -> Any:
    """The backward pass with few programs, and rows cut into parts, so that small inputs take all of its loops."""
    width = max(16, 2 ** (dim - 1).bit_length() // parts)
    return mock.patch.multiple("armillary.kernels.norm_triton", PROGRAMS=programs, BACKWARD_WIDTH=width)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    DIMS,
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3, 512]),
    st.sampled_from([1, 2, 4]),
    st.floats(1e-8, 1.0),
    st.sampled_from(["norm", "both", "out", "sum"]),
)
def test_norm_and_its_gradients(
    outer: list[int], dim: int, dtype: torch.dtype, programs: int, parts: int, eps: float, part: str
) -> None:
    x, residual, weight, pull, push = leaves(
        (*outer, dim), (*outer, dim), (dim,), (*outer, dim), (*outer, dim), dtype=dtype
    )
    with tiled(programs, dim, parts):
        if part == "norm":
            check("norm", lambda *a: rms_norm(*a, eps), lambda *a: plain_norm(*a, eps), (x, weight), (pull,))
        else:
            pulls = (None if part == "sum" else pull, None if part == "out" else push)
            inputs = (x, residual, weight)
            check("norm", lambda *a: add_rms_norm(*a, eps), lambda *a: plain_norm_of_sum(*a, eps), inputs, pulls)


@pytest.mark.parametrize("dim", [5120, TRITON_DIM - 3, TRITON_DIM, TRITON_DIM + 1])
def test_long_rows(dim: int) -> None:
    inputs = leaves((3, dim), (3, dim), (dim,), dtype=torch.bfloat16)
    pulls = leaves((3, dim), (3, dim), dtype=torch.bfloat16, seed=1)
    check("norm", lambda *a: add_rms_norm(*a, 1e-5), lambda *a: plain_norm_of_sum(*a, 1e-5), inputs, pulls)


def test_many_short_rows() -> None:
    """As the heads of queries are."""
    x, weight, pull = leaves((7, 41, 4, 64), (64,), (7, 41, 4, 64), dtype=torch.bfloat16)
    with tiled(5, 64):
        check("norm", lambda *a: rms_norm(*a, 1e-6), lambda *a: plain_norm(*a, 1e-6), (x, weight), (pull,))


def test_any_layout_and_expanded_gradients() -> None:
    base, other, weight = leaves((6, 5, 40), (40, 5, 6), (24,), dtype=torch.float32)

    def of(call: Any) -> Any:
        return lambda a, b, w: call(a[:, :, 8:32], b.transpose(0, 2)[..., 8:32], w, 1e-5)

    one = torch.ones((), device=base.device)
    pulls = (one.expand(6, 5, 24), leaves((5, 6, 24), dtype=torch.float32)[0].transpose(0, 1))
    check("norm", of(add_rms_norm), of(plain_norm_of_sum), (base, other, weight), pulls)


def test_rows_at_a_distance_are_read_where_they_lie() -> None:
    """Inputs and gradients alike: the parts of a wider projection and of its gradient."""
    wide, other, weight = leaves((6, 5, 40), (6, 5, 30), (24,), dtype=torch.float32)
    pull, push = leaves((6, 5, 50), (6, 5, 60), dtype=torch.float32, seed=1)
    pulls = (pull[..., 8:32], push[..., 16:40])

    def of(call: Any) -> Any:
        return lambda a, b, w: call(a[..., 16:], b[..., 6:], w, 1e-5)

    check("norm", of(add_rms_norm), of(plain_norm_of_sum), (wide, other, weight), pulls)
    alone, plain_alone = (lambda a, w, f=f: f(a[..., 16:], w, 1e-5) for f in (rms_norm, plain_norm))
    check("norm", alone, plain_alone, (wide, weight), pulls[:1])
    with tiled(2, 24, parts=2):
        check("norm", alone, plain_alone, (wide, weight), pulls[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_in_llamas_order(dtype: torch.dtype) -> None:
    """Apart from the root mean square's last bit, which may tip a rounding, the bits are those of plain torch."""
    x, residual, weight = leaves((64, 96), (64, 96), (96,), dtype=dtype)
    with kernels("norm=triton"):
        out, total = add_rms_norm(x, residual, weight, 1e-5)
        alone = rms_norm(total.detach(), weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, alone)
    same = (out == plain_norm(x + residual, weight, 1e-5)).float().mean()
    assert same > (0.5 if dtype == torch.float32 else 0.99)


def test_a_float32_weight_on_a_bfloat16_stream() -> None:
    (x, pull), (weight,) = leaves((9, 48), (9, 48), dtype=torch.bfloat16), leaves((48,), dtype=torch.float32)
    with kernels("norm=triton"):
        out, d_x, d_weight = results(lambda *a: rms_norm(*a, 1e-5), (x, weight), (pull,))
    assert (out.dtype, d_x.dtype, d_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want = plain_norm(x, weight, 1e-5).to(torch.bfloat16)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=0)
