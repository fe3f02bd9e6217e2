"""The Triton kernels of the merge against plain torch, through the public functions: any strides, empty sides, bits."""

import math
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.attention.merge import merge, merge_

interpreter.install()

from armillary.kernels.attention import merge_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = st.tuples(st.integers(0, 2), st.integers(0, 140), st.integers(1, 3), st.sampled_from([1, 3, 16, 40, 64]))
EMPTY = st.sampled_from([0.0, 0.3, 1.0])
WIDE = st.sampled_from([torch.float32, torch.bfloat16])
LAYOUT = st.sampled_from(["plain", "head first", "scattered", "stretch"])


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMILLARY_KERNELS", "merge=triton")


def plainly(function: Any, *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMILLARY_KERNELS", "merge=torch")
        return function(*arguments)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "head first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "scattered":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "stretch":
        longer = torch.full((tensor.shape[0], tensor.shape[1] + 3, *tensor.shape[2:]), math.nan, dtype=tensor.dtype)
        longer = longer.to(tensor.device)
        longer[:, 1:-2] = tensor
        return longer[:, 1:-2]
    return tensor


def parts(shape: tuple[int, ...], seed: int, empty: float, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """out_a in float32, lse_a, out_b in `dtype`, lse_b; NaN in the rows of an empty side."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq, heads, _ = shape
    made = []
    for wide in (torch.float32, dtype):
        out = torch.randn(shape, generator=generator)
        lse = torch.randn(batch, heads, seq, generator=generator) * 3
        lse[torch.rand(lse.shape, generator=generator) < empty] = -math.inf
        out = out.masked_fill((lse == -math.inf).transpose(1, 2).unsqueeze(-1), math.nan).to(wide)
        made += [laid_out(out.to(DEVICE), layout), laid_out(lse.to(DEVICE), layout)]
    return made


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    rtol = 1e-6 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=rtol, atol=3e-6)


@settings(max_examples=60, deadline=None)
@given(SHAPES, EMPTY, WIDE, st.sampled_from([None, torch.float32, torch.bfloat16]), LAYOUT, st.integers(0, 999))
@example((1, 33, 2, 64), 0.3, torch.bfloat16, None, "head first", 0)
def test_values(shape: Any, empty: float, dtype: torch.dtype, result: Any, layout: str, seed: int) -> None:
    one, two, three, four = parts(shape, seed, empty, dtype, layout)
    got = merge((one, two), (three, four), result)
    for ours, theirs in zip(got, plainly(merge, (one, two), (three, four), result), strict=True):
        close(ours, theirs)
    wanted = plainly(merge, (one, two), (three, four))
    merge_((one, two), (three, four))
    close(one, wanted[0])
    close(two, wanted[1])


@settings(max_examples=60, deadline=None)
@given(SHAPES, EMPTY, WIDE, LAYOUT, st.booleans(), st.booleans(), st.integers(0, 999))
@example((1, 33, 2, 64), 0.3, torch.bfloat16, "plain", True, True, 0)
def test_gradients(
    shape: Any, empty: float, dtype: torch.dtype, layout: str, with_lse: bool, of_lse: bool, seed: int
) -> None:
    tensors = parts(shape, seed, empty, dtype, layout)
    nothing = (tensors[1] == -math.inf) & (tensors[3] == -math.inf)
    # What comes for rows where neither side saw a key is not read.
    d_out = laid_out(torch.randn(shape, device=DEVICE), layout)
    d_out = d_out.masked_fill(nothing.transpose(1, 2).unsqueeze(-1), math.nan)
    d_lse = torch.randn(nothing.shape, device=DEVICE).masked_fill(nothing, math.nan) if with_lse else None

    def gradients() -> Any:
        leaves = [t.detach().requires_grad_(of_lse or i % 2 == 0) for i, t in enumerate(tensors)]
        out, lse = merge((leaves[0], leaves[1]), (leaves[2], leaves[3]))
        outputs = [(out, d_out)] + ([(lse, d_lse)] if with_lse and of_lse else [])
        results, slopes = zip(*outputs, strict=True)
        return torch.autograd.grad(results, [t for t in leaves if t.requires_grad], slopes)

    for ours, theirs in zip(gradients(), plainly(gradients), strict=True):
        assert not ours.isnan().any()
        rtol = 1e-5 if ours.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("gap", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_wide_gaps(gap: float, level: float) -> None:
    one, two, three, _ = parts((1, 20, 2, 16), 0, 0.0, torch.float32, "plain")
    two = torch.full_like(two, level)
    out, lse = merge((one, two), (three, two + gap))
    assert torch.equal(out, three if gap > 0 else one)
    assert torch.equal(lse, torch.maximum(two, two + gap))


def test_every_number_of_a_destination_is_written_and_no_other() -> None:
    tensors = parts((2, 37, 3, 40), 1, 0.2, torch.float32, "plain")
    around = torch.full((2, 39, 3, 48), math.nan, device=DEVICE)
    lse = torch.full((2, 3, 39), math.nan, device=DEVICE)
    merge_triton.forward(*tensors, around[:, 1:-1, :, 8:], lse[..., 1:-1])
    assert not around[:, 1:-1, :, 8:].isnan().any()
    assert not lse[..., 1:-1].isnan().any()
    assert bool(around[..., :8].isnan().all() & around[:, [0, -1]].isnan().all() & lse[..., [0, -1]].isnan().all())


def test_same_bits_every_time() -> None:
    one, two, three, four = parts((2, 70, 3, 64), 3, 0.2, torch.bfloat16, "plain")
    first, second = (merge((one, two), (three, four)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_poison_is_not_hidden() -> None:
    """A NaN in an lse, or in a side that counts, reaches the result."""
    one, two, three, four = parts((1, 3, 1, 8), 3, 0.0, torch.float32, "plain")
    two[0, 0, 0] = four[0, 0, 1] = three[0, 2, 0, 5] = math.nan
    out, lse = merge((one, two), (three, four))
    assert out.isnan().sum(-1).flatten().tolist() == [8, 8, 1]
    assert lse.isnan().flatten().tolist() == [True, True, False]
