"""What the tests of payloads share: kernels/quantise.py's docstring in Python's integers, and values to quantise."""

import math
import struct
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels.quantise import BLOCK, FORMATS, accumulate

LARGEST = torch.finfo(torch.float32).max
TOPS = {"int8": 127, "int4": 7}
SEEDS = [None, 0, 1, 2**32 + 5, 2**64 - 1]


def dequantise(
    payload: Tensor, num_elements: int, form: str, block: int = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of one payload."""
    return accumulate([payload], num_elements, form, block, dtype)


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
