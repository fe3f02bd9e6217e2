"""Rotary positions: Llama's convention, Llama 3's scaling, exact far out."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import leaves
from torch import Tensor

from armillary.kernels.rope import frequencies, rotate_qk, tables

LLAMA3 = (8.0, 1.0, 4.0, 8192)


def turned(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    return rotate_qk(x, x, *tables(positions, frequencies(x.shape[-1], theta), torch.float64))[0]


def test_frequencies_by_hand() -> None:
    expected = [1.0, 100**-0.25, 100**-0.5, 100**-0.75]
    torch.testing.assert_close(frequencies(8, 100.0), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_frequencies_are_those_of_transformers(scaling: tuple[float, float, float, int] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope: dict[str, float | str] = {"rope_type": "default", "rope_theta": 500_000.0}
    if scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, scaling, strict=True))}
    # Its releases 4 and 5 name these differently.
    names_of_both: dict[str, Any] = {"rope_theta": 500_000.0, "rope_parameters": rope, "rope_scaling": rope}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=512, num_attention_heads=4, **names_of_both)
    ).inv_freq.double()
    torch.testing.assert_close(frequencies(128, 500_000.0, scaling), theirs, rtol=2e-6, atol=0)


def test_scaling_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain, scaled = frequencies(128, 500_000.0), frequencies(128, 500_000.0, LLAMA3)
    wavelengths = 2 * math.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    assert fast.any()
    assert slow.any()
    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8, rtol=1e-14, atol=0)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert ((between > 1 / 8) & (between < 1)).all()


def test_pairs_are_the_two_halves() -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., 1] = 1  # the first of pair (1, 3), which turns by 100 ** -0.5 a position
    out = turned(x, torch.tensor([[7]]), theta=100.0).flatten()
    expected = torch.tensor([0, math.cos(0.7), 0, math.sin(0.7)], dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(at: int, to: int) -> float:
        return float((turned(q, torch.tensor([[at]])) * turned(k, torch.tensor([[to]]))).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-12)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


def test_far_positions_are_exact_in_float32_tables() -> None:
    frequency = frequencies(64, 10_000.0)
    cos, sin = tables(torch.tensor([[131_071]]), frequency, torch.float32)
    angles = [131_071 * float(f) for f in frequency]
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-7)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-7)


def test_bfloat16_is_turned_in_float32() -> None:
    x, y = leaves((2, 9, 3, 8), (2, 9, 2, 8), dtype=torch.bfloat16)
    positions = torch.arange(9).expand(2, 9)
    cos, sin = tables(positions, frequencies(8, 10_000.0), torch.float32)
    q, k = rotate_qk(x, y, cos, sin)
    assert q.dtype == k.dtype == torch.bfloat16
    wide_q, wide_k = rotate_qk(x.float(), y.float(), cos, sin)
    assert torch.equal(q, wide_q.bfloat16())
    assert torch.equal(k, wide_k.bfloat16())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_gradcheck_with_positions_in_any_order(
    batch: int, seq: int, heads: int, kv_heads: int, half: int, alike: bool
) -> None:
    q, k = leaves((batch, seq, heads, 2 * half), (batch, seq, kv_heads, 2 * half))
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 99, (1 if alike else batch, seq), generator=generator)
    cos, sin = tables(positions, frequencies(2 * half, 100.0), torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: rotate_qk(a, b, cos, sin), (q, k))


def test_one_row_of_tables_serves_all() -> None:
    (x,) = leaves((2, 3, 2, 6))
    shared = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(turned(x, shared), turned(x, shared.expand(2, 3)), rtol=0, atol=0)


def test_keys_are_turned_as_queries_are() -> None:
    q, k = leaves((2, 5, 3, 6), (2, 5, 1, 6))
    cos, sin = tables(torch.arange(5).expand(2, 5), frequencies(6, 100.0), torch.float64)
    assert torch.equal(rotate_qk(q, k, cos, sin)[1], rotate_qk(k, q, cos, sin)[0])


@pytest.mark.parametrize("changed", ["odd", "head_dim", "seq", "batch", "table_batch", "tables"])
def test_shapes_that_do_not_fit_are_refused(changed: str) -> None:
    size = 5 if changed == "odd" else 6
    q, k = leaves((3, 5, 2, size), (3, 5, 2, size))
    k = {"head_dim": k[..., :4], "seq": k[:, :4], "batch": k[:2]}.get(changed, k)
    positions = torch.arange(5).expand(2 if changed == "table_batch" else 3, 5)
    cos, sin = tables(positions, frequencies(6, 100.0), torch.float64)
    with pytest.raises(ValueError, match="q, k, cos, sin have shapes"):
        rotate_qk(q, k, cos, sin[:, :1] if changed == "tables" else sin)


def test_compiled_it_turns_the_same() -> None:
    """torch 2.13 loses what eager code writes into halves of a tensor, without a word."""
    q, k = leaves((2, 5, 4, 6), (2, 5, 2, 6))
    cos, sin = tables(torch.arange(5).expand(2, 5), frequencies(6, 100.0), torch.float64)
    for got, want in zip(
        torch.compile(rotate_qk, backend="aot_eager")(q, k, cos, sin), rotate_qk(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
