"""The Triton kernel of rotary positions against plain torch in float64."""

from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, kernels, leaves, results
from torch import Tensor

from armillary.kernels.rope import frequencies, rotate_qk, tables
from armillary.launch.bench_gpu.plain import plain_rope

interpreter.install()


def angles(rows: int, seq: int, head_dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 100_000, (rows, seq), generator=torch.Generator().manual_seed(0))
    cos, sin = tables(positions, frequencies(head_dim, 10_000.0), torch.float32)
    return cos.to(DEVICE), sin.to(DEVICE)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(0, 7),
    st.integers(1, 5),
    st.integers(1, 3),
    st.one_of(st.integers(1, 64), st.sampled_from([40, 48, 64, 96, 128])),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([64, 2048]),
)
def test_turned_and_gradients_turned_back(
    batch: int, seq: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype, alike: bool, pairs: int
) -> None:
    shapes = [(batch, seq, count, 2 * half) for count in (heads, kv_heads)]
    cos, sin = angles(1 if alike else batch, seq, 2 * half)
    inputs, pulls = (leaves(*shapes, dtype=dtype, seed=seed) for seed in (0, 1))
    with mock.patch("armillary.kernels.rope_triton.PAIRS", pairs):
        check("rope", lambda *a: rotate_qk(*a, cos, sin), lambda *a: plain_rope(*a, cos, sin), inputs, pulls)


def test_any_layout() -> None:
    """Heads before tokens, a part of a wider projection, and gradients likewise or expanded."""
    cos, sin = angles(2, 7, 12)
    inputs = leaves((2, 3, 7, 12), (2, 7, 2, 40), dtype=torch.float32)
    pulls = (torch.ones((), device=DEVICE).expand(2, 7, 3, 12), leaves((2, 7, 12, 2), dtype=torch.float32)[0].mT)

    def of(call: Any) -> Any:
        return lambda q, k: call(q.transpose(1, 2), k[..., 8:32:2], cos, sin)

    check("rope", of(rotate_qk), of(plain_rope), inputs, pulls)
    check(
        "rope",
        of(rotate_qk),
        of(plain_rope),
        inputs,
        (pulls[0], leaves((7, 2, 2, 12), dtype=torch.float32)[0].transpose(0, 1)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_back_undoes_it(dtype: torch.dtype) -> None:
    q, k = leaves((2, 5, 3, 80), (2, 5, 1, 80), dtype=dtype)
    cos, sin = angles(1, 5, 80)
    with kernels("rope=triton"):
        turned_q, turned_k, d_q, d_k = results(
            lambda a, b: rotate_qk(a, b, cos, sin), (q, k), rotate_qk(q.detach(), k.detach(), cos, sin)
        )
    assert not torch.equal(turned_q[:, 1:], q[:, 1:])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((d_q, d_k), (q, k), rtol=4 * eps, atol=4 * eps)
    assert turned_q.is_contiguous()
    assert turned_k.is_contiguous()


def test_a_result_that_is_not_used_pulls_nothing() -> None:
    q, k = leaves((1, 4, 2, 8), (1, 4, 1, 8), dtype=torch.float32)
    cos, sin = angles(1, 4, 8)
    pulls = (None, torch.ones_like(k))
    check("rope", lambda *a: rotate_qk(*a, cos, sin), lambda *a: plain_rope(*a, cos, sin), (q, k), pulls)
