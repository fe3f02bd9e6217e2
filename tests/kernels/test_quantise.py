"""Payloads against their docstring, followed by the reference in integers, and what they promise: bounds, no bias."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
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
    blocks,
    by_the_book,
    dequantise,
    forms,
    offsets,
    scales_of,
    seeds,
    vectors,
)
from torch import Tensor

from armillary.kernels import quantise as module
from armillary.kernels.quantise import BLOCKS, FORMATS, accumulate, payload_bytes, quantise, requantise


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
