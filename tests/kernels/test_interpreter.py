"""bfloat16 in the interpreter is what torch computes: without this, kernel tests in bfloat16 would prove nothing."""

import os

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the NaNs and infinities below
]

EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
"""All 65536 bfloat16 values: zeros, subnormals, infinities and NaNs among them."""


def shuffled(seed: int) -> Tensor:
    return EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(seed))]


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def elementwise(X, Y, Z, Out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    y = tl.load(Y + at)
    z = tl.load(Z + at)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "subtract":
        out = x - y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "divide":
        out = x / y
    elif OPERATION == "scale":
        out = x * 3 + 0.5
    elif OPERATION == "negate":
        out = -x
    elif OPERATION == "absolute":
        out = tl.abs(x)
    elif OPERATION == "fma":
        out = tl.fma(x, y, z)
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "minimum":
        out = tl.minimum(x, y)
    elif OPERATION == "clamp":
        out = tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z))
    elif OPERATION == "less":
        out = x < y
    elif OPERATION == "less_equal":
        out = x <= y
    elif OPERATION == "greater":
        out = x > y
    elif OPERATION == "greater_equal":
        out = x >= y
    elif OPERATION == "eq":
        out = x == y
    elif OPERATION == "not_equal":
        out = x != y
    elif OPERATION == "where":
        out = tl.where(x < y, z, x + y)
    tl.store(Out + at, out)


def run(operation: str, x: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    elementwise[(1,)](x, y, z, out, OPERATION=operation, BLOCK=x.numel())
    return out


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x.double() * y.double() + z.double()).bfloat16()


ARITHMETIC = {
    "add": lambda x, y, z: x + y,
    "subtract": lambda x, y, z: x - y,
    "multiply": lambda x, y, z: x * y,
    "divide": lambda x, y, z: x / y,
    "scale": lambda x, y, z: x * 3 + 0.5,
    "negate": lambda x, y, z: -x,
    "absolute": lambda x, y, z: x.abs(),
    "fma": lambda x, y, z: fma(x, y, z),
    "where": lambda x, y, z: torch.where(x < y, z, x + y),
}


@pytest.mark.parametrize("operation", ARITHMETIC)
def test_arithmetic(operation: str) -> None:
    x, y, z = shuffled(0), shuffled(1), shuffled(2)
    same(run(operation, x, y, z), ARITHMETIC[operation](x, y, z))
    x, y, z = (torch.randn(4096, generator=torch.Generator().manual_seed(s)).bfloat16() for s in range(3))
    same(run(operation, x, y, z), ARITHMETIC[operation](x, y, z))


@pytest.mark.parametrize("operation", ["less", "less_equal", "greater", "greater_equal", "eq", "not_equal"])
def test_comparisons(operation: str) -> None:
    x, y = shuffled(0), shuffled(1)
    y[::3] = x[::3]
    same(run(operation, x, y, x, torch.bool), getattr(torch, operation)(x, y))


@pytest.mark.parametrize("operation", ["maximum", "minimum", "clamp"])
def test_extremes(operation: str) -> None:
    # Without NaN, which triton 3.6 and 3.9 treat differently.
    x, y, z = (shuffled(seed).nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf) for seed in range(3))
    by_torch = {
        "maximum": torch.maximum(x, y),
        "minimum": torch.minimum(x, y),
        "clamp": torch.clamp(x, torch.minimum(y, z), torch.maximum(y, z)),
    }
    same(run(operation, x, y, z), by_torch[operation])


@triton.jit
def copy(X, Out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Out + at, tl.load(X + at).to(Out.dtype.element_ty))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    copy[(1,)](x, out, BLOCK=x.numel())
    return out


@pytest.mark.parametrize("beyond", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_float32_rounds_to_the_nearest_even(beyond: int) -> None:
    x = ((torch.arange(2**16) << 16) + beyond).to(torch.uint32).view(torch.float32)
    same(cast(x, torch.bfloat16), x.bfloat16())
    same(cast(x.double(), torch.bfloat16), x.bfloat16())


def test_widening_is_exact() -> None:
    same(cast(EVERY, torch.float32), EVERY.float())
    same(cast(EVERY, torch.float64), EVERY.double())


def test_casts_of_other_types() -> None:
    same(cast(EVERY, torch.float16), EVERY.half())
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    same(cast(halves, torch.bfloat16), halves.bfloat16())
    small = EVERY[EVERY.abs() < 1e4]
    small = small[: 1 << (len(small).bit_length() - 1)]
    same(cast(small, torch.int32), small.int())
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    same(cast(whole, torch.bfloat16), whole.bfloat16())


@triton.jit
def reduce(X, Out, Index, OPERATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    x = tl.load(X + row[:, None] * COLUMNS + column[None, :])
    if OPERATION == "sum":
        tl.store(Out + row, tl.sum(x, axis=1))
    elif OPERATION == "max":
        out, index = tl.max(x, axis=1, return_indices=True)
        tl.store(Out + row, out)
        tl.store(Index + row, index)
    elif OPERATION == "min":
        out, index = tl.min(x, axis=1, return_indices=True)
        tl.store(Out + row, out)
        tl.store(Index + row, index)
    elif OPERATION == "value":
        tl.store(Out + row, tl.max(x, axis=1) + tl.min(x, axis=1))
    elif OPERATION == "whole":
        tl.store(Out, tl.sum(tl.sum(x, axis=1), axis=0))
    elif OPERATION == "cumsum":
        tl.store(Out + row[:, None] * COLUMNS + column[None, :], tl.cumsum(x, axis=1))


def reduced(x: Tensor, operation: str, *shape: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(shape, dtype=torch.bfloat16)
    index = torch.zeros(x.shape[0], dtype=torch.int32)
    reduce[(1,)](x, out, index, OPERATION=operation, ROWS=x.shape[0], COLUMNS=x.shape[1])
    return out, index.long()


@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_reductions(log_rows: int, log_columns: int, seed: int) -> None:
    rows, columns = 2**log_rows, 2**log_columns
    # Whole numbers: sums are exact in float32, in any order.
    x = torch.randint(-200, 200, (rows, columns), generator=torch.Generator().manual_seed(seed)).bfloat16()
    sums = x.float().sum(1).bfloat16()
    same(reduced(x, "sum", rows)[0], sums)
    same(reduced(x, "whole", 1)[0], sums.float().sum(0, keepdim=True).bfloat16())
    same(reduced(x, "cumsum", rows, columns)[0], x.float().cumsum(1).bfloat16())
    same(reduced(x, "value", rows)[0], x.amax(1) + x.amin(1))
    for operation, expected in (("max", x.amax(1)), ("min", x.amin(1))):
        out, index = reduced(x, operation, rows)
        same(out, expected)
        same(x.gather(1, index[:, None])[:, 0], out)


@triton.jit
def product(A, B, Out, rows, inner, columns, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, inner, BLOCK):  # a bound known at run time only
        k = start + row
        a = tl.load(A + row[:, None] * inner + k[None, :], mask=(row < rows)[:, None] & (k < inner)[None, :], other=0.0)
        b = tl.load(
            B + k[:, None] * columns + row[None, :], mask=(k < inner)[:, None] & (row < columns)[None, :], other=0.0
        )
        total = tl.dot(a, b, total)
    where = (row < rows)[:, None] & (row < columns)[None, :]
    tl.store(Out + row[:, None] * columns + row[None, :], total.to(Out.dtype.element_ty), mask=where)


@given(st.integers(1, 16), st.integers(0, 70), st.integers(1, 16), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_dot_and_loop_bounds(rows: int, inner: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Quarters: products and sums are exact in float32, in any order.
    a, b = (torch.randint(-99, 99, s, generator=generator) / 4 for s in ((rows, inner), (inner, columns)))
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(rows, columns, dtype=dtype)
        product[(1,)](a.bfloat16(), b.bfloat16(), out, rows, inner, columns, BLOCK=16)
        same(out, (a @ b).to(dtype))
