"""Joined partial results are the result over all keys, whatever is empty, and their gradients are autograd's."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.attention.merge import merge, merge_

Pair = tuple[Tensor, Tensor]
WIDE = st.sampled_from([torch.float32, torch.bfloat16])


def truth(*parts: Pair) -> Pair:
    """By the definition, in float64."""
    lses = torch.stack([lse.double() for _, lse in parts])
    top = lses.amax(0).clamp_min(-1e300)
    weights = (lses - top).exp()
    total = weights.sum(0)
    shares = torch.where(total > 0, weights / total, 0)
    outs = torch.stack([out.double().masked_fill(rows(lse) == -math.inf, 0) for out, lse in parts])
    return (outs * rows(shares)).sum(0), torch.where(total > 0, top + total.log(), -math.inf)


def rows(values: Tensor) -> Tensor:
    return values.transpose(-1, -2).unsqueeze(-1)


def parts(
    shape: tuple[int, int, int, int], count: int, seed: int, empty: float = 0.0, spread: float = 3.0, **dtype: Any
) -> list[Pair]:
    """Partial results whose empty rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq, heads, _ = shape
    made = []
    for _ in range(count):
        out = torch.randn(shape, generator=generator, **dtype)
        lse = torch.randn(batch, heads, seq, generator=generator, **dtype) * spread
        lse[torch.rand(lse.shape, generator=generator) < empty] = -math.inf
        made.append((out.masked_fill(rows(lse) == -math.inf, math.nan), lse))
    return made


SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 4), st.sampled_from([1, 3, 8, 64]))
EMPTY = st.sampled_from([0.0, 0.3, 1.0])


@settings(max_examples=80, deadline=None)
@given(SHAPES, EMPTY, WIDE, WIDE, st.sampled_from([None, torch.float32, torch.bfloat16]), st.integers(0, 999))
@example((2, 700, 4, 64), 0.3, torch.bfloat16, torch.float32, torch.float32, 0)  # several pieces
@example((2, 700, 4, 64), 0.0, torch.float32, torch.float32, torch.float32, 0)
def test_equals_the_definition(
    shape: Any, empty: float, dtype_a: torch.dtype, dtype_b: torch.dtype, dtype: torch.dtype | None, seed: int
) -> None:
    (out_a, lse_a), (out_b, lse_b) = parts(shape, 2, seed, empty)
    a, b = (out_a.to(dtype_a), lse_a), (out_b.to(dtype_b), lse_b)
    out, lse = merge(a, b, dtype)
    assert out.dtype == (dtype or torch.promote_types(dtype_a, dtype_b))
    assert lse.dtype == torch.float32
    expected, expected_lse = truth(a, b)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if out.dtype == torch.float32 else 0.0
    # Arithmetic is float32: a bfloat16 result is rounded once.
    assert bool(((out.double() - expected).abs() <= tolerance + expected.abs() * 2**-8 * (not tolerance)).all())


@settings(max_examples=40, deadline=None)
@given(SHAPES, EMPTY, WIDE, st.integers(0, 999))
def test_in_place_into_a_view(shape: Any, empty: float, dtype: torch.dtype, seed: int) -> None:
    a, (out_b, lse_b) = parts(shape, 2, seed, empty)
    b = (out_b.to(dtype), lse_b)
    batch, seq, heads, head_dim = shape
    longer = torch.full((batch, seq + 3, heads, head_dim), math.nan), torch.full((batch, heads, seq + 3), math.nan)
    view = longer[0][:, 1 : seq + 1], longer[1][:, :, 1 : seq + 1]
    view[0].copy_(a[0])
    view[1].copy_(a[1])
    merge_(view, b)
    for got, want in zip(view, merge(a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert bool(longer[0][:, [0, -2, -1]].isnan().all())
    assert bool(longer[1][..., [0, -2, -1]].isnan().all())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), EMPTY, st.randoms(use_true_random=False), st.integers(0, 999))
def test_any_order_of_joins_agrees(count: int, empty: float, random: Any, seed: int) -> None:
    """Associative and commutative within rounding: a ring may join in its order, a tree in another."""
    pool = parts((2, 5, 3, 8), count, seed, empty, dtype=torch.float64)
    expected = truth(*pool)
    while len(pool) > 1:
        first, second = (pool.pop(random.randrange(len(pool))) for _ in range(2))
        pool.append(merge(first, second))
    for got, want in zip(pool[0], expected, strict=True):
        torch.testing.assert_close(
            got.nan_to_num(0.0, neginf=-9.0), want.nan_to_num(0.0, neginf=-9.0), rtol=0, atol=1e-13
        )
    assert not pool[0][0].isnan().any()


def test_keys_split_at_random_are_the_keys_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    score, value = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((3, 50), (50, 4)))
    whole = score.softmax(-1) @ value
    cuts = [0, 1, 17, 17, 49, 50]
    result = None
    for begin, end in itertools.pairwise(cuts):
        out = (score[:, begin:end].softmax(-1) @ value[begin:end]).view(1, 3, 1, 4)
        part = out, score[:, begin:end].logsumexp(-1).view(1, 1, 3)
        result = part if result is None else merge(result, part)
    assert result is not None
    torch.testing.assert_close(result[0].view(3, 4), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(result[1].view(3), score.logsumexp(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gap", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_wide_gaps(gap: float, level: float) -> None:
    (out_a, lse_a), (out_b, _) = parts((1, 4, 2, 8), 2, 0)
    leaves = [out_a, lse_a * 0 + level, out_b, lse_a * 0 + level + gap]
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = merge((leaves[0], leaves[1]), (leaves[2], leaves[3]))
    assert torch.equal(out, out_b if gap > 0 else out_a)
    torch.testing.assert_close(lse, torch.maximum(leaves[1], leaves[3]), rtol=0, atol=1e-40)
    gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    sums = [gradient.sum().item() for gradient in gradients]
    assert sums == ([0, 0, 64, 8] if gap > 0 else [64, 8, 0, 0])


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3)), st.integers(0, 999))
def test_gradients_are_those_of_the_values(shape: Any, seed: int) -> None:
    leaves = [t.requires_grad_() for pair in parts(shape, 2, seed, dtype=torch.float64) for t in pair]
    for which in ([0, 1, 2, 3], [0, 2], [1], [0], [3]):
        fixed = [t.detach() for t in leaves]

        def joined(*moving: Tensor, which: list[int] = which, fixed: list[Tensor] = fixed) -> Pair:
            given = dict(zip(which, moving, strict=True))
            one, two, three, four = (given.get(i, fixed[i]) for i in range(4))
            return merge((one, two), (three, four))

        assert torch.autograd.gradcheck(joined, [leaves[i] for i in which])


@settings(max_examples=60, deadline=None)
@given(SHAPES, EMPTY, WIDE, st.booleans(), st.booleans(), st.integers(0, 999))
@example((2, 700, 4, 64), 0.3, torch.bfloat16, True, True, 0)
def test_gradients_where_sides_are_empty(
    shape: Any, empty: float, dtype: torch.dtype, with_out: bool, with_lse: bool, seed: int
) -> None:
    """Equal to those of the definition with the empty sides cut off; NaN in the gradients of empty rows is not read."""
    (out_a, lse_a), (out_b, lse_b) = parts(shape, 2, seed, empty)
    leaves = [out_a, lse_a, out_b.to(dtype), lse_b]
    some_a, some_b = lse_a > -math.inf, lse_b > -math.inf
    d_out, d_lse = (t.nan_to_num(0.5) for t in parts(shape, 1, seed + 1)[0])
    d_out = d_out.masked_fill(rows(~(some_a | some_b)), math.nan)
    d_lse = d_lse.masked_fill(~(some_a | some_b), math.nan)
    got = gradients_of(leaves, d_out if with_out else None, d_lse if with_lse else None)
    # By hand, in float64.
    share_a = torch.where(some_a, torch.where(some_b, torch.sigmoid(lse_a.double() - lse_b.double()), 1), 0)
    share_b = torch.where(some_b, 1 - share_a, 0)
    slope = d_out.double().nan_to_num(0) * with_out
    pull = d_lse.double().nan_to_num(0) * with_lse
    moved = (slope * (leaves[0].double() - leaves[2].double()).nan_to_num(0)).sum(-1).transpose(1, 2)
    both = share_a * share_b * moved
    expected = [rows(share_a) * slope, share_a * pull + both, rows(share_b) * slope, share_b * pull - both]
    for one, want, leaf in zip(got, expected, leaves, strict=True):
        if one is None:
            assert not with_out
            continue
        assert one.dtype == leaf.dtype
        bound = (1e-5, 1e-5) if one.dtype == torch.float32 else (2**-8, 1e-5)
        torch.testing.assert_close(one.double(), want, rtol=bound[0], atol=bound[1])


def gradients_of(tensors: list[Tensor], d_out: Tensor | None, d_lse: Tensor | None) -> list[Tensor | None]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = merge((leaves[0], leaves[1]), (leaves[2], leaves[3]))
    pairs = [(r, d) for r, d in zip(results, (d_out, d_lse), strict=True) if d is not None]
    if not pairs:
        return [None] * 4
    outputs, slopes = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, leaves, slopes, allow_unused=True))


def test_little_is_kept() -> None:
    """No `out` where no gradient of an lse is wanted, and nothing but inputs ever."""
    kept: list[Tensor] = []
    (out_a, lse_a), (out_b, lse_b) = parts((1, 4, 2, 8), 2, 0)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        merge((out_a.requires_grad_(), lse_a), (out_b, lse_b))
        assert {t.data_ptr() for t in kept} == {lse_a.data_ptr(), lse_b.data_ptr()}
        merge((out_a, lse_a.requires_grad_()), (out_b, lse_b))
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (out_a, lse_a, out_b, lse_b)}


def test_same_bits_every_time() -> None:
    a, b = parts((2, 300, 4, 64), 2, 3, 0.2)
    for one, two in zip(merge(a, b), merge(a, b), strict=True):
        assert torch.equal(one, two)


def test_float64_keeps_its_digits_and_mixes() -> None:
    a, b = parts((1, 3, 2, 4), 2, 5, dtype=torch.float64)
    mixed = merge(a, (b[0].float(), b[1].float()))
    assert mixed[0].dtype == mixed[1].dtype == torch.float64
    narrow = a[0].float(), a[1].float()
    merge_(narrow, b)
    torch.testing.assert_close(narrow[0].double(), truth(a, b)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda o, s: ((o, s), (o[:, :1], s)), "do not fit"),
        (lambda o, s: ((o, s.transpose(1, 2)), (o, s.transpose(1, 2))), "do not fit"),
        (lambda o, s: ((o, s), (o, s.bfloat16())), "must be float32 or float64"),
    ],
)
def test_what_does_not_fit_is_refused(break_it: Any, message: str) -> None:
    out, lse = parts((1, 4, 2, 8), 1, 0)[0]
    for join in (merge, merge_):
        with pytest.raises(ValueError, match=message):
            join(*break_it(out, lse))
