"""Triton's payloads are those of plain torch and of the reference in integers, to the bit."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantise_reference import (
    GOLDEN,
    LARGEST,
    SEEDS,
    TINY,
    TOPS,
    bits,
    by_the_book,
    dequantise,
    forms,
    number,
    offsets,
    seeds,
    vectors,
)
from torch import Tensor

from armillary.kernels.quantise import BLOCKS, FORMATS, accumulate, payload_bytes, quantise, requantise

interpreter.install()
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from armillary.kernels import quantise_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@contextmanager
def computed_by(choice: str) -> Iterator[None]:
    """ARMILLARY_KERNELS is `choice`, and new tensors hold other numbers than zero until they are written."""
    empty = torch.empty

    def filled(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(0xA5) if tensor.dtype == torch.uint8 else tensor

    with mock.patch.dict(os.environ, {"ARMILLARY_KERNELS": f"quantise={choice}"}), mock.patch("torch.empty", filled):
        yield


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; but NaN, whose bits are the device's own, equals NaN."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0).view(kind), b.nan_to_num(7.0).view(kind))


def both(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What Triton gives, asserted to be what it gives again, and what plain torch gives."""
    with computed_by("torch"):
        want = call(*inputs)
    with computed_by("triton"):
        got, again = (call(*(tensor.to(DEVICE) for tensor in inputs)).cpu() for _ in range(2))
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype == torch.uint8:
        assert torch.equal(got, want)
        assert torch.equal(got, again)
    else:
        assert same_values(got, want)
        assert same_values(got, again)
    return got


@settings(max_examples=120, deadline=None)
@given(vectors(finite=False), forms, st.sampled_from(BLOCKS), seeds, offsets, st.sampled_from(DTYPES))
def test_payloads(x: Tensor, form: str, block: int, seed: int | None, offset: int, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    payload = both(lambda x: quantise(x, form, block, seed, offset), x)
    assert bytes(payload.tolist()).hex() == by_the_book(x, form, block, seed, offset).hex()
    for dtype in DTYPES:
        both(lambda payload: dequantise(payload, len(x), form, block, dtype), payload)  # noqa: B023


@settings(max_examples=60, deadline=None)
@given(st.lists(vectors(finite=False), min_size=1, max_size=5), forms, st.sampled_from(BLOCKS), seeds, offsets)
def test_sums(parts: list[Tensor], form: str, block: int, seed: int | None, offset: int) -> None:
    length = max(len(part) for part in parts)
    rows = [quantise(torch.cat([part, part.new_zeros(length - len(part))]), form, block, seed) for part in parts]
    stacked = torch.stack(rows)
    for dtype in DTYPES:
        both(lambda *rows: accumulate(rows, length, form, block, dtype), *rows)  # noqa: B023
    total = both(lambda rows: accumulate(rows, length, form, block), stacked)
    again = both(lambda rows: requantise(rows, length, form, block, seed, offset), stacked)
    assert torch.equal(both(lambda *rows: requantise(rows, length, form, block, seed, offset), *rows), again)
    assert bytes(again.tolist()).hex() == by_the_book(total, form, block, seed, offset).hex()


@settings(max_examples=30, deadline=None)
@given(st.integers(4000, 20000), forms, st.sampled_from(BLOCKS), seeds, offsets, st.booleans())
def test_several_programs(length: int, form: str, block: int, seed: int | None, offset: int, normal: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(length, generator=generator)
    if not normal:
        x = torch.randint(-(2**31), 2**31, (length,), generator=generator).to(torch.int32).view(torch.float32)
    first = both(lambda x: quantise(x, form, block, seed, offset), x)
    # Of like sizes, so that the order of a sum is seen in its last bits.
    others = [quantise(x.roll(shift) * factor, form, block) for shift, factor in ((1, 3.7), (7, -0.3), (64, 11.0))]
    rows = torch.stack([first, *others])
    both(lambda rows: accumulate(rows, length, form, block), rows)
    both(lambda rows: requantise(rows, length, form, block, seed, offset), rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", FORMATS)
def test_ties_levels_and_borders(form: str, seed: int | None) -> None:
    # A block for each largest magnitude; in it every half level, with its two neighbours, of both signs.
    top = TOPS.get(form, 64)
    steps = torch.arange(0, 2 * top + 1) / (2 * top)
    tops = [1.0, 1.5, 1.5 - 2**-23, 1.5 + 2**-22, LARGEST, 3e38, 2**-96, top * 2**-96, 2**-126, 2**-140, top * 0.125]
    tops += [
        top * s / 2**16 for s in (33333, 40503, 50021, 65535)
    ]  # 1 / s is not exact: what is a tie is so by rounding
    values = steps[None] * torch.tensor(tops)[:, None]
    near = torch.stack([values, values.nextafter(torch.tensor(0.0)), values.nextafter(torch.tensor(math.inf))], -1)
    near = near.clamp(max=LARGEST).flatten(1)
    rows = torch.zeros(len(tops), 2, 512)
    for sign, part in zip((1, -1), (near[:, :384], near[:, -384:]), strict=True):
        half = torch.cat([part[:, :511], values[:, -1:].expand(-1, 511)], 1)[:, :511]
        rows[:, (1 - sign) // 2] = torch.cat([values[:, -1:], half], 1) * sign
    x = rows.flatten()
    payload = both(lambda x: quantise(x, form, 512, seed), x)
    assert bytes(payload.tolist()).hex() == by_the_book(x, form, 512, seed, 0).hex()


@pytest.mark.parametrize(("form", "seed"), GOLDEN)
def test_golden_bytes(form: str, seed: int | None) -> None:
    with computed_by("triton"):
        payload = quantise(torch.tensor(TINY, device=DEVICE), form, 32, seed, offset=7)
    assert bytes(payload.tolist()).hex() == GOLDEN[form, seed]


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("form", FORMATS)
def test_rounding_never_leaves_the_levels(form: str, seed: int | None) -> None:
    # A little more than the top level: one in 2^14 would be rounded up to a level that is not there.
    x = torch.full((2**17,), LARGEST)
    x[::2] *= -1
    both(lambda x: quantise(x, form, seed=seed), x)


FUSED = """
import triton
from armillary.kernels.quantise_triton import BLOCK, specimens
for specimen in specimens():
    if "SEEDED" in specimen.constants and specimen.constants["BLOCK"] == BLOCK:
        names = specimen.kernel.arg_names
        types = {name: specimen.signature.get(name, "constexpr") for name in names}
        constants = {(names.index(name),): value for name, value in specimen.constants.items()}
        source = triton.compiler.ASTSource(specimen.kernel, types, constexprs=constants)
        options = {"num_warps": specimen.num_warps, "enable_fp_fusion": True}
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        print(specimen.name, triton.compile(source, target=target, options=options).asm["ptx"].count("fma."))
"""
"""Prints how many fused multiply-adds sm_90 would run in each kernel that quantises."""


def test_only_exact_products_are_fused_with_a_sum() -> None:
    # The interpreter fuses nothing, a GPU's compiler whatever it can: what it made of the kernels has to be read.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert len(counts) == 15
    for name, fused in counts.items():
        # A thread's 16 values: that of level x scale with the sum of payloads, and nothing after it.
        assert int(fused) == (16 if name.startswith("requantise") else 0), name


@triton.jit
def reciprocals(scales: tl.tensor, out: tl.tensor, LENGTH: tl.constexpr) -> None:
    at = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    tl.store(out + at, quantise_triton._reciprocal(tl.load(scales + at)))


def test_every_reciprocal_is_the_nearest_float() -> None:
    # All numbers of 16 bits at once; the least and largest exponents, and one between.
    significands = torch.arange(2**15, dtype=torch.int32) << 8
    scales = torch.cat([significands + (exponent << 23) for exponent in (31, 127, 252)]).to(DEVICE)
    out = torch.zeros(len(scales), device=DEVICE)
    reciprocals[(3,)](scales, out, LENGTH=2**15)
    want = (
        1 / scales.cpu().view(torch.float32).double()
    ).float()  # too near a tie to round twice: never, says the docstring
    assert torch.equal(out.cpu(), want)


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_and_exponent_is_read_alike(form: str) -> None:
    payload = torch.randint(0, 256, (payload_bytes(256 * 32, form, 32),), generator=torch.Generator().manual_seed(0))
    payload[: 256 * 16] = torch.arange(256).repeat(16)
    scales = torch.arange(256) if form == "e3m0" else torch.tensor([0, 1, 2, bits(0.375) >> 24]).repeat(256)
    payload[len(payload) - len(scales) :] = scales
    both(lambda payload: dequantise(payload, 256 * 32, form, 32), payload.to(torch.uint8))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("form", FORMATS)
def test_strides_alignment_and_gradients(form: str, seed: int | None) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    payload = both(lambda x: quantise(x[::2], form, seed=seed), x)
    assert torch.equal(both(lambda x: quantise(x.requires_grad_(), form, seed=seed), x[::2].clone()), payload)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), payload])
    spaced = torch.stack([payload, payload], 1)
    wide = torch.cat([torch.stack([payload, payload]), torch.zeros(2, 3, dtype=torch.uint8)], 1)
    for view, stored in (
        (lambda p: [p[1:]], shifted),
        (lambda p: [p[1:], p[1:]], shifted),
        (lambda p: p.T, spaced),
        (lambda p: p[:, :-3], wide),
        (lambda p: p[:1].expand(3, -1), payload[None]),
    ):
        both(lambda p: accumulate(view(p), 2500, form), stored)  # noqa: B023
        both(lambda p: requantise(view(p), 2500, form, seed=seed), stored)  # noqa: B023


@pytest.mark.parametrize("form", FORMATS)
def test_empty(form: str) -> None:
    empty = both(lambda x: quantise(x, form, seed=1), torch.zeros(0))
    both(lambda payload: dequantise(payload, 0, form), empty)
    both(lambda payload: requantise([payload, payload], 0, form), empty)


def test_largest_subnormal_and_least_normal_blocks() -> None:
    # What a GPU that flushes subnormals would see as zero is zero here, too.
    x = torch.tensor([number(1), -number(0x7FFFFF), number(0x800000), -0.0]).repeat_interleave(32)
    for form in FORMATS:
        for seed in (None, 5):
            with computed_by("triton"):
                got = dequantise(quantise(x.to(DEVICE), form, 32, seed), len(x), form, 32).cpu()
            assert torch.equal(got.view(torch.int32), torch.zeros(len(x), dtype=torch.int32))
