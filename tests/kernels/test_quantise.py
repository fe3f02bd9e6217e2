"""Payloads against an implementation of the docstring in Python's integers, and what they promise: bounds, no bias."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels import quantise as module
from armillary.kernels.quantise import BLOCKS, FORMATS, accumulate, dequantise, payload_bytes, quantise, requantise

LARGEST = torch.finfo(torch.float32).max
TOPS = {"int8": 127, "int4": 7}
SEEDS = [None, 0, 1, 2**32 + 5, 2**64 - 1]


# The docstring, one value at a time.


def bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def number(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))


def mix(h: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ h >> shift) * factor % 2**32
    return h


def noise(seed: int, start: int, j: int) -> int:
    key = mix((mix((seed % 2**32 + 0x9E3779B9) % 2**32) + (seed >> 32)) % 2**32)
    stride = mix((key + 0x9E3779B9) % 2**32) | 1
    return mix((mix((key + (start >> 32)) % 2**32) + (start + j) * stride) % 2**32)


def integer_scale(a: float, top: int) -> float:
    """The smallest number of 16 significant bits with top x scale >= a, by exact arithmetic."""
    want = Fraction(a) / top
    if want <= Fraction(1, 2**96):
        return 2.0**-96
    exponent = math.floor(math.log2(want)) - 17
    steps = math.ceil(want / Fraction(2) ** exponent)
    while steps > 2**16:
        exponent, steps = exponent + 1, math.ceil(want / Fraction(2) ** (exponent + 1))
    scale = Fraction(steps) * Fraction(2) ** exponent
    while scale * top > Fraction(LARGEST):
        scale -= Fraction(2) ** exponent
    return float(scale)


def power_scale(a: float, seeded: bool) -> float:
    """A 64th of the power of two nearest to a, or the smallest that is not below it."""
    power = Fraction(1, 2**96)
    while power < 2**127 and power * (1 if seeded else Fraction(3, 2)) < Fraction(a):
        power *= 2
    return float(power / 64)


def integer_level(x: np.float32, s: float, top: int, random: int | None) -> int:
    inverse = np.float32(1) / np.float32(s)
    if random is None:
        return int(np.rint(x * inverse))
    z = int(np.rint(np.clip(x * (inverse * np.float32(2**16)), -top * 2**16, top * 2**16)))
    return int((z + (random >> 16)) // 2**16)


def power_nibble(x: np.float32, s: float, random: int | None) -> int:
    y = Fraction(abs(float(x))) / Fraction(s)
    low = round(min(y, Fraction(1)) * 2**23)  # round() of a Fraction is to even
    z = min(7 * 2**23, max(bits(float(y)) - bits(0.5), low))
    e = round(Fraction(z, 2**23)) if random is None else (z + (random >> 9)) // 2**23
    return int(e + 8 * (e > 0 and x < 0))


def packed(levels: list[int], form: str) -> bytes:
    half = len(levels) // 2
    if form == "int8":
        return bytes(level % 256 for level in levels)
    return bytes(low % 16 + high % 16 * 16 for low, high in zip(levels[:half], levels[half:], strict=True))


def by_the_book(x: Tensor, form: str, block: int, seed: int | None, offset: int) -> bytes:
    values = np.zeros(-(-len(x) // block) * block, np.float32)
    values[: len(x)] = x.float().numpy()
    codes, scales = bytearray(), bytearray()
    for start in range(0, len(values), block):
        row, whole = values[start : start + block], offset + start
        a = float(np.abs(row).max())
        random = [None if seed is None else noise(seed, whole, j) for j in range(block)]
        if not math.isfinite(a):
            codes += bytes(block * FORMATS[form].bits // 8)
            scales += struct.pack("<I", 0x7FC00000) if form in TOPS else b"\xff"
        elif form in TOPS:
            s = integer_scale(a, TOPS[form])
            codes += packed([integer_level(v, s, TOPS[form], r) for v, r in zip(row, random, strict=True)], form)
            scales += struct.pack("<f", s)
        else:
            s = power_scale(a, seed is not None)
            codes += packed([power_nibble(v, s, r) for v, r in zip(row, random, strict=True)], form)
            scales.append(round(math.log2(s)) + 127)
    return bytes(codes + scales)


# Values: of every magnitude, alike or not within a block, some of them exact levels, ties, zeros or not finite.


@st.composite
def vectors(draw: st.DrawFn, finite: bool = True) -> Tensor:
    length = draw(st.integers(0, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "levels", "wide", "bits", "zeros"]))
    exponent = draw(st.sampled_from([-149, -130, -120, -103, -97, -96, -90, -20, 0, 3, 60, 120, 126]))
    x = torch.randn(length, generator=generator, dtype=torch.float64)
    if kind == "levels":
        x = (x * 64).round() / 2
    if kind == "wide":
        x *= torch.exp2(torch.randint(-12, 12, (length,), generator=generator))
    x = (x * 2.0**exponent).clamp(-LARGEST, LARGEST).float()
    if kind == "bits":
        x = torch.randint(-(2**31), 2**31, (length,), generator=generator).to(torch.int32).view(torch.float32)
        x = x.nan_to_num(0.0, LARGEST, -LARGEST)
    if kind == "zeros":
        x[torch.rand(length, generator=generator) < 0.9] = draw(st.sampled_from([0.0, -0.0]))
    if length and not finite:
        spots = draw(st.lists(st.integers(0, length - 1), max_size=2))
        x[spots] = draw(st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]))
    return x


forms = st.sampled_from(list(FORMATS))
blocks = st.sampled_from([32, 128])
seeds = st.none() | st.integers(0, 2**64 - 1)
offsets = st.sampled_from([0, 1, 64, 2**32 - 64, 2**32 - 5, 2**40 + 3, 2**62])


def scales_of(payload: Tensor, form: str, num_blocks: int) -> Tensor:
    size = FORMATS[form].scale_bytes
    raw = payload[len(payload) - num_blocks * size :].clone()
    return raw.view(torch.float32) if size == 4 else torch.exp2(raw.double() - 127)


@settings(max_examples=150, deadline=None)
@given(vectors(finite=False), forms, blocks, seeds, offsets)
def test_bits_are_those_of_the_docstring(x: Tensor, form: str, block: int, seed: int | None, offset: int) -> None:
    payload = quantise(x, form, block, seed, offset)
    assert payload.dtype == torch.uint8
    assert len(payload) == payload_bytes(len(x), form, block)
    assert bytes(payload.tolist()).hex() == by_the_book(x, form, block, seed, offset).hex()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("a", [1.0, 127.0, 7.0, 1.5, 1.5 - 2**-23, 1.5 + 2**-22, LARGEST, 3e38, 2**-96, 127 * 2**-96])
def test_scales_at_their_borders(form: str, a: float) -> None:
    x = torch.tensor([a]).nextafter(torch.tensor(math.inf)).repeat(3)
    x = torch.stack([x[0].clamp(max=LARGEST), torch.tensor(a), torch.tensor(a).nextafter(torch.tensor(0.0))])
    for value in x:
        for seed in (None, 3):
            payload = quantise(value[None], form, 32, seed)
            assert bytes(payload.tolist()).hex() == by_the_book(value[None], form, 32, seed, 0).hex()
            assert dequantise(payload, 1, form, 32).isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_seeded_rounding_never_leaves_the_levels(form: str) -> None:
    # Here a / scale is a little more than the top level: one in 2^14 would be rounded up to a level that is not there.
    x = torch.full((2**17,), LARGEST)
    x[::2] *= -1
    back = dequantise(quantise(x, form, seed=1), len(x), form)
    assert torch.equal(back.sign(), x.sign())
    assert (back.abs() > 0.49 * LARGEST).all()


# 20 values with ties, zeros and both signs; nearest, then seeded. For other implementations to be held against.
TINY = [1.0, -1.0, 0.5, 0.75, -0.75, 0.1, -0.1, 0.01, -0.01, 0.0]
TINY += [-0.0, 0.3, 0.6, -0.9, 1e-3, 0.03, -0.2, 0.25, 1.6, -1.6]
GOLDEN: dict[tuple[str, int | None], str] = {
    ("int8", None): "4fb1283cc408f801ff00001830b90002f0147f81000000000000000000000000006a4e3c",
    ("int8", 2**40 + 3): "50b1283bc508f801ff00001730b90003f0147f81000000000000000000000000006a4e3c",
    ("int4", None): "f41c72930d00000000000001030c0000000f6a3e",
    ("int4", 2**40 + 3): "f51c73930d01000000000001030c0001000f6a3e",
    ("e3m0", None): "c64e75f60e030b0000000004050e00017a",
    ("e3m0", 2**40 + 3): "b64e75f50e030b0000000004060e00017a",
}


@pytest.mark.parametrize(("form", "seed"), GOLDEN)
def test_golden_bytes(form: str, seed: int | None) -> None:
    payload = quantise(torch.tensor(TINY), form, 32, seed, offset=7)
    assert bytes(payload.tolist()).hex() == GOLDEN[form, seed]


@pytest.mark.parametrize(
    ("form", "block", "bytes_of_1000"),
    [("int8", 128, 8 * 132), ("int8", 256, 4 * 260), ("int4", 128, 8 * 68), ("e3m0", 128, 8 * 65), ("e3m0", 256, 516)],
)
def test_payload_bytes(form: str, block: int, bytes_of_1000: int) -> None:
    assert payload_bytes(1000, form, block) == bytes_of_1000
    assert payload_bytes(0, form, block) == 0
    assert payload_bytes(1, form, block) == payload_bytes(block, form, block)
    empty = quantise(torch.zeros(0), form, block, seed=1)
    assert empty.shape == (0,)
    assert dequantise(empty, 0, form, block).shape == (0,)
    assert requantise([empty, empty], 0, form, block).shape == (0,)


@settings(max_examples=150, deadline=None)
@given(vectors(), forms, blocks, seeds)
def test_errors_keep_their_bounds(x: Tensor, form: str, block: int, seed: int | None) -> None:
    payload = quantise(x, form, block, seed)
    num_blocks = -(-len(x) // block)
    rows = torch.zeros(num_blocks, block, dtype=torch.float64)
    rows.view(-1)[: len(x)] = x.double()
    back = torch.zeros_like(rows)
    back.view(-1)[: len(x)] = dequantise(payload, len(x), form, block, torch.float64)
    s = scales_of(payload, form, num_blocks).double()[:, None]
    a, size, error = rows.abs().amax(1, keepdim=True), rows.abs(), (rows - back).abs()
    if form in TOPS:
        assert (s <= torch.clamp(a / TOPS[form] * (1 + 2**-15), min=2.0**-96)).all()
        assert (error <= s * (0.50002 if seed is None else 1.00004)).all()
    else:
        assert (64 * s <= torch.clamp(a * (4 / 3 if seed is None else 2), min=2.0**-96)).all()
        allowed = torch.maximum(size / 3, 0.50001 * s) if seed is None else torch.maximum(size, s)
        allowed[size > 64 * s] = math.inf  # beyond the top, which is so for the very largest numbers only
        assert (error <= allowed).all()
        assert ((size <= 64 * s * (1.5 if seed is None else 1)) | (size > 2.0**127)).all()
        assert (error <= size).all() or seed is not None


@settings(max_examples=100, deadline=None)
@given(vectors(finite=False), forms, blocks)
def test_what_was_rounded_to_nearest_comes_back_the_same(x: Tensor, form: str, block: int) -> None:
    payload = quantise(x, form, block)
    for dtype in (torch.float32, torch.float64):
        values = dequantise(payload, len(x), form, block, dtype)
        assert torch.equal(quantise(values, form, block), payload)


@settings(max_examples=50, deadline=None)
@given(vectors(), forms, seeds)
def test_not_finite_is_seen(x: Tensor, form: str, seed: int | None) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        y = torch.cat([x, torch.ones(1)]).repeat_interleave(2)
        spot = len(y) // 2
        y[spot] = bad
        back = dequantise(quantise(y, form, 32, seed), len(y), form, 32)
        inside = torch.arange(len(y)) // 32 == spot // 32
        assert back[inside].isnan().all()
        assert back[~inside].isfinite().all()
    too_large = torch.tensor([1e39, 1.0], dtype=torch.float64)
    assert dequantise(quantise(too_large, form), 2, form).isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", FORMATS)
def test_zeros_and_levels_are_exact(form: str, seed: int | None) -> None:
    zeros = dequantise(quantise(-torch.zeros(300), form, seed=seed), 300, form)
    assert torch.equal(zeros.view(torch.int32), torch.zeros(300, dtype=torch.int32))  # +0, to the bit
    positive = torch.arange(0, TOPS[form] + 1.0) if form in TOPS else torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    levels = torch.cat([positive, -positive[1:]])
    # In every block the top level, so that the scale is 2^-3 and 16 bits hold it.
    rows = torch.cat([levels.new_full((-(-len(levels) // 31), 1), positive[-1].item()), _in_rows(levels, 31)], dim=1)
    x = rows.flatten() / 8
    assert torch.equal(dequantise(quantise(x, form, 32, seed), len(x), form, 32), x)


def _in_rows(x: Tensor, width: int) -> Tensor:
    return torch.cat([x, x.new_zeros(-len(x) % width)]).view(-1, width)


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_reads_as_documented(form: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    size = FORMATS[form].bits * 128 // 8
    scale = 0.375 if form in TOPS else 0.25
    raw = struct.pack("<f", scale) if form in TOPS else bytes([125])
    payload = torch.cat([codes, torch.frombuffer(bytearray(raw * (256 // size)), dtype=torch.uint8)])
    got = dequantise(payload, 256 // size * 128, form) / scale

    def level(nibble: int) -> int:
        if form == "int4":
            return nibble - 16 * (nibble > 7)
        return 0 if nibble % 8 == 0 else 2 ** (nibble % 8 - 1) * (-1 if nibble > 7 else 1)

    if form == "int8":
        want = codes.view(torch.int8).float()
    else:
        rows = [[byte % 16 for byte in row] + [byte // 16 for byte in row] for row in codes.view(-1, size).tolist()]
        want = torch.tensor([[level(nibble) for nibble in row] for row in rows]).flatten().float()
    assert torch.equal(got, want)
    assert not got[got == 0].signbit().any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.data(), forms, seeds, offsets)
def test_chunks_cut_between_blocks_give_the_bits_of_the_whole(
    length: int, data: st.DataObject, form: str, seed: int | None, offset: int
) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(length))
    cut = 32 * data.draw(st.integers(0, length // 32))
    whole = quantise(x, form, 32, seed, offset)
    parts = [quantise(x[:cut], form, 32, seed, offset), quantise(x[cut:], form, 32, seed, offset + cut)]
    code_bytes = 32 * FORMATS[form].bits // 8
    ends = [len(p) // (code_bytes + FORMATS[form].scale_bytes) * code_bytes for p in parts]
    codes = [p[:end] for p, end in zip(parts, ends, strict=True)]
    scales = [p[end:] for p, end in zip(parts, ends, strict=True)]
    assert torch.equal(torch.cat(codes + scales), whole)


@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("form", FORMATS)
def test_size_of_the_working_chunk_changes_nothing(
    form: str, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(module.CHUNK_VALUES["cpu"] + 1000, generator=torch.Generator().manual_seed(0))
    payloads = [quantise(x, form, seed=seed), quantise(x * 3, form, seed=seed)]
    results = [*payloads, accumulate(payloads, len(x), form), requantise(payloads, len(x), form, seed=seed)]
    monkeypatch.setitem(module.CHUNK_VALUES, "cpu", 3 * 128)
    payloads = [quantise(x, form, seed=seed), quantise(x * 3, form, seed=seed)]
    again = [*payloads, accumulate(payloads, len(x), form), requantise(payloads, len(x), form, seed=seed)]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert torch.equal(results[0], quantise(x, form, seed=seed))


@pytest.mark.parametrize("form", FORMATS)
def test_seeded_rounding_has_no_bias(form: str) -> None:
    # 2,000 seeds, always the same ones: each value's mean within 5 of the standard deviations that chance would give.
    runs = 2000
    x = torch.randn(256, generator=torch.Generator().manual_seed(1))
    x[:7] = torch.tensor([0.0, 1e-2, -1e-2, 3e-3, -3e-3, 0.02, -0.02])
    total = torch.zeros(256, dtype=torch.float64)
    for seed in range(runs):
        total += dequantise(quantise(x, form, 128, seed), 256, form, 128)
    s = scales_of(quantise(x, form, 128, 0), form, 2).double()[:, None]
    positive = torch.arange(TOPS[form] + 1.0) if form in TOPS else torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    grid = s * torch.cat([-positive[1:].flip(0), positive]).double()
    above = torch.searchsorted(grid, x.double().view(2, 128)).clamp(min=1)
    low, high = grid.gather(1, above - 1).flatten(), grid.gather(1, above).flatten()
    deviation = ((x - low) * (high - x)).clamp(min=0).sqrt() / runs**0.5
    error = total / runs - x
    assert (error.abs() <= 5 * deviation + 2**-15 * s.repeat_interleave(128)).all()
    pulls = (error / deviation)[deviation > 1e-3 * (high - low) / runs**0.5]
    assert len(pulls) > 240
    assert abs(pulls.mean()) < 4 / len(pulls) ** 0.5
    assert 0.85 < pulls.std() < 1.15


def test_noise_of_neighbours_seeds_and_far_offsets_is_unrelated() -> None:
    x = torch.full((2**16,), 0.5)
    x[::128] = 127.0  # scale 1: every other value is 0 or 1, by one bit of the noise
    kept = torch.arange(len(x)) % 128 != 0

    def coins(seed: int, offset: int = 0) -> Tensor:
        return dequantise(quantise(x, "int8", 128, seed, offset), len(x), "int8", 128)[kept] * 2 - 1

    base = coins(0)
    others = [coins(1), coins(2**32), coins(2**63), coins(0, len(x)), coins(0, 2**32), coins(0, 2**40)]
    others += [base.roll(shift) for shift in (1, 2, 64, 127, 254)]
    limit = 5 / len(base) ** 0.5
    assert abs(base.mean()) < limit
    for other in others:
        assert abs((base * other).mean()) < limit


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(1, 5), forms, blocks, seeds)
def test_sums_are_float32_in_the_order_given(length: int, ranks: int, form: str, block: int, seed: int | None) -> None:
    x = (
        torch.randn(ranks, length, generator=torch.Generator().manual_seed(ranks))
        * torch.logspace(-3, 3, ranks)[:, None]
    )
    payloads = [quantise(row, form, block, seed=rank) for rank, row in enumerate(x)]
    want = torch.zeros(length)
    for payload in payloads:
        want = want + dequantise(payload, length, form, block)
    assert torch.equal(accumulate(payloads, length, form, block), want)
    assert torch.equal(accumulate(torch.stack(payloads), length, form, block), want)
    again = requantise(payloads, length, form, block, seed, offset=5)
    assert torch.equal(again, quantise(want, form, block, seed, offset=5))


@pytest.mark.parametrize("form", FORMATS)
def test_a_sum_too_large_or_with_nan_is_nan_after_requantising(form: str) -> None:
    huge = quantise(torch.full((4,), 3e38), form)
    assert accumulate([huge, huge], 4, form).isinf().all()
    assert dequantise(requantise([huge, huge], 4, form), 4, form).isnan().all()
    broken = quantise(torch.full((4,), math.nan), form)
    assert dequantise(requantise([huge, broken], 4, form), 4, form).isnan().all()


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_other_dtypes_strides_and_gradients(form: str, seed: int | None) -> None:
    x = torch.randn(777, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = quantise(x.float(), form, seed=seed)
    assert torch.equal(quantise(x, form, seed=seed), want)
    assert torch.equal(quantise(x.float().requires_grad_(), form, seed=seed), want)
    assert torch.equal(quantise(x.float().repeat_interleave(2)[::2], form, seed=seed), want)
    assert torch.equal(quantise(x.bfloat16(), form, seed=seed), quantise(x.bfloat16().float(), form, seed=seed))
    back = dequantise(want, len(x), form)
    assert torch.equal(dequantise(want, len(x), form, dtype=torch.bfloat16), back.bfloat16())
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), want])[1:]  # its scales are not aligned
    assert torch.equal(dequantise(shifted, len(x), form), back)
    kept = x.float()
    quantise(kept, form, seed=seed)
    assert torch.equal(kept, x.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.zeros(4), "int7"), "int7.*int8, int4, e3m0"),
        (lambda: quantise(torch.zeros(4), "int8", 100), f"100.*{BLOCKS[0]}, "),
        (lambda: quantise(torch.zeros(2, 2), "int8"), r"flat float32.*\(2, 2\)"),
        (lambda: quantise(torch.zeros(4, dtype=torch.int32), "int8"), "not torch.int32"),
        (lambda: dequantise(torch.zeros(131, dtype=torch.uint8), 128, "int8"), r"\(132,\), not torch.uint8 \(131,\)"),
        (lambda: dequantise(torch.zeros(132), 128, "int8"), "not torch.float32"),
        (lambda: accumulate([], 128, "int8"), "not none"),
    ],
)
def test_mistakes_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("form", FORMATS)
def test_gpu_gives_the_bits_of_the_cpu(form: str, seed: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32).view(torch.float32)
    x[50_000:] = torch.randn(50_003, generator=generator)
    payload = quantise(x, form, seed=seed, offset=2**32 - 5000)
    assert torch.equal(quantise(x.cuda(), form, seed=seed, offset=2**32 - 5000).cpu(), payload)
    sums = accumulate([payload, payload], len(x), form)
    on_gpu = accumulate([payload.cuda(), payload.cuda()], len(x), form).cpu()
    assert torch.equal(sums.nan_to_num(7.0), on_gpu.nan_to_num(7.0))


@settings(max_examples=200, deadline=None)
@given(a=st.floats(2.0**-120, LARGEST, width=32))
def test_scales_keep_products_exact(a: float) -> None:
    for form, top in TOPS.items():
        s = scales_of(quantise(torch.tensor([a]), form, 32), form, 1).item()
        assert bits(s) & 0xFF == 0
        assert all(Fraction(s) * k == Fraction(float(np.float32(s) * np.float32(k))) for k in range(top + 1))
