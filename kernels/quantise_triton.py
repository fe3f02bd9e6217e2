"""Triton kernels for the payloads of kernels/quantise.py: the same bits as the plain torch path, in one pass.

A program takes some whole blocks, 4,096 values: the first halves of the blocks as one tile, the second as another, so
that two nibbles meet in a byte without a shuffle. Between load and store nothing leaves the registers. Bytes a value
must move to and from memory, the limit of each operation (R payloads, blocks of 128, b = 1.031 for int8, 0.531 for int4
and 0.508 for e3m0; v the bytes of a value: 4, 2 or 8):

    quantise     v + b
    accumulate   R b + v
    requantise   R b + b      without this kernel R b + 4 and 4 + b: 8 bytes more

Why the bits are the CPU's, whatever a compiler fuses (a * b + c may be rounded once or twice):
- A product that is added to is exact (level x scale: 16 bits and at most 7), or has a minimum between it and the sum.
- Magnitudes are compared, and what is not finite is found, as integers: no rule about NaN, no flushed subnormals.
- To round to an integer, 2^23 is added to a number in [0, 2^23]; the low bits of the sum are the integer.
- The one division, once a block, is done by integers.
A NaN that accumulate returns has the sign and payload that the device gives it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.quantise import BLOCK, BLOCKS, FORMATS, LOWEST, Payloads, Stream
from armillary.kernels.specimen import Specimen

TILE = 4096
"""Values a program takes, 16 a thread: four loads of 16 bytes of float32 are in flight at once."""
NUM_WARPS = 8
LEAST = tl.constexpr(LOWEST)


@triton.jit
def _places(ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """int32 offsets (ROWS, WIDTH) of the first WIDTH items of rows that are STRIDE items apart."""
    return tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _mix(h: tl.tensor) -> tl.tensor:
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h


@triton.jit
def _counters(key: tl.tensor, stride: tl.tensor, index: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """uint32 (ROWS, HALF), to be mixed, of the first halves of blocks that begin at `index`, int64 (ROWS,)."""
    key, stride = key.to(tl.uint32), stride.to(tl.uint32)
    starts = _mix((index >> 32).to(tl.uint32) + key) + index.to(tl.uint32) * stride
    return starts[:, None] + (tl.arange(0, HALF).to(tl.uint32) * stride)[None, :]


@triton.jit
def _integer_scale(largest: tl.tensor, TOP: tl.constexpr, CAP: tl.constexpr) -> tl.tensor:
    """Bits of the scales, from the bits of the largest magnitudes (ROWS,): `_integers` of the torch path says how."""
    size = largest.to(tl.float32, bitcast=True)
    scale = ((size * ((1 - 2.0**-22) / TOP)).to(tl.int32, bitcast=True) + 0xFF) & -0x100
    short = scale.to(tl.float32, bitcast=True) * TOP < size
    return tl.minimum(tl.maximum(scale + tl.where(short, 0x100, 0), LEAST << 23), CAP)


@triton.jit
def _reciprocal(scale: tl.tensor) -> tl.tensor:
    """1 / scale as float32 (ROWS,), rounded to nearest, of the bits of normal scales of 16 significant bits.

    Long division by integers: 2^39 / m, where m is the 16 bits, is 24 bits long (25 if m = 2^15), and never a tie. A
    division of floats may be a few units off; the exact one, tl.div_rn, is a call on NVIDIA and costs registers.
    """
    m = ((scale & 0x7FFF00 | 0x800000) >> 8).to(tl.uint32)
    digits = 0x40000000 // m
    rest = (0x40000000 - digits * m) << 9
    last = rest // m
    rest -= last * m
    digits = (digits << 9) + last + tl.where(rest * 2 > m, 1, 0).to(tl.uint32)
    bits = digits.to(tl.float32).to(tl.int32, bitcast=True) + (103 << 23) - (scale & 0x7F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _integer_levels(
    x: tl.tensor, inverse: tl.tensor, counters: tl.tensor, TOP: tl.constexpr, SEEDED: tl.constexpr
) -> tl.tensor:
    """Levels (ROWS, HALF) int32; `inverse` (ROWS, 1) is 1 / scale, seeded times 2^16."""
    # Nearest, too, goes through the minimum, which changes no level: it keeps the product apart from the sum.
    limit: tl.constexpr = TOP * 65536.0 if SEEDED else TOP * 1.0
    size = tl.minimum(tl.abs(x) * inverse, limit) + 8388608.0
    level = size.to(tl.int32, bitcast=True) - 0x4B000000
    level = tl.where(x < 0, -level, level)
    if SEEDED:
        level = (level + (_mix(counters) >> 16).to(tl.int32)) >> 16
    return level


@triton.jit
def _power_nibbles(x: tl.tensor, factor: tl.tensor, counters: tl.tensor, SEEDED: tl.constexpr) -> tl.tensor:
    """Nibbles (ROWS, HALF) int32; `factor` (ROWS, 1) is 2^23 / scale."""
    y = tl.abs(x) * factor
    low = (tl.minimum(y, 8388608.0) + 8388608.0).to(tl.int32, bitcast=True) - (1 << 23)
    fixed = tl.minimum(tl.maximum(y.to(tl.int32, bitcast=True), low) - (149 << 23), 7 << 23)
    if SEEDED:
        nibble = (fixed + (_mix(counters) >> 9).to(tl.int32)) >> 23
    else:
        nibble = (fixed + ((fixed >> 23) & 1) + 0x3FFFFF) >> 23
    return tl.where((x < 0) & (nibble > 0), nibble + 8, nibble)


@triton.jit
def _encode(
    low: tl.tensor, high: tl.tensor, first: tl.tensor, num_blocks: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    key: tl.tensor, stride: tl.tensor, offset: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, CAP: tl.constexpr,
    SEEDED: tl.constexpr,
) -> None:  # fmt: skip
    """Stores the blocks from `first` (int64) on, given as the float32 tiles (ROWS, BLOCK / 2) of their halves."""
    HALF: tl.constexpr = BLOCK // 2
    row = first + tl.arange(0, ROWS)
    sizes = tl.maximum(low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(sizes, axis=1)
    low_counters, high_counters = sizes, sizes
    if SEEDED:
        low_counters = _counters(key, stride, offset + row * BLOCK, HALF)
        high_counters = low_counters + stride.to(tl.uint32) * HALF
    if TOP > 0:
        scale = _integer_scale(largest, TOP, CAP)
        factor = _reciprocal(scale)[:, None]
        if SEEDED:
            factor *= 65536.0
        low_codes = _integer_levels(low, factor, low_counters, TOP, SEEDED)
        high_codes = _integer_levels(high, factor, high_counters, TOP, SEEDED)
    else:
        step: tl.constexpr = 0x7FFFFF if SEEDED else 0x3FFFFF
        scale = tl.minimum(tl.maximum((largest + step) >> 23, LEAST), 254) - 6
        factor = ((277 - scale) << 23).to(tl.float32, bitcast=True)[:, None]
        low_codes = _power_nibbles(low, factor, low_counters, SEEDED)
        high_codes = _power_nibbles(high, factor, high_counters, SEEDED)
    here, finite = row < num_blocks, largest < 0x7F800000
    scale = tl.where(finite, scale, 0x7FC00000 if TOP > 0 else 255)
    tl.store(scales + row, scale.to(scales.dtype.element_ty), mask=here)
    at = codes + first * (BLOCK * BITS // 8) + _places(ROWS, BLOCK * BITS // 8, HALF)
    here, finite = here[:, None], finite[:, None]
    if BITS == 8:
        tl.store(at, tl.where(finite, low_codes, 0).to(tl.uint8), mask=here)
        tl.store(at + HALF, tl.where(finite, high_codes, 0).to(tl.uint8), mask=here)
    else:
        nibbles = (low_codes & 15) | ((high_codes & 15) << 4)
        tl.store(at, tl.where(finite, nibbles, 0).to(tl.uint8), mask=here)


@triton.jit
def _power_values(nibbles: tl.tensor) -> tl.tensor:
    """float32 0 and +-2^(e - 1) of nibbles int32."""
    powers = (1 << (nibbles & 7)) >> 1
    return tl.where(nibbles > 7, -powers, powers).to(tl.float32)


@triton.jit
def _decode(
    first: tl.tensor, num_blocks: tl.tensor, num_payloads: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    codes_stride: tl.tensor, scales_stride: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """float32 sums (ROWS, BLOCK / 2) of the payloads' values, in their order: both halves of blocks from `first` on."""
    HALF: tl.constexpr = BLOCK // 2
    places = _places(ROWS, BLOCK * BITS // 8, HALF)
    row = tl.arange(0, ROWS)
    here = first + row < num_blocks
    codes += first * (BLOCK * BITS // 8)
    scales += first
    low_sum = tl.zeros((ROWS, HALF), tl.float32)
    high_sum = tl.zeros((ROWS, HALF), tl.float32)
    for _ in range(num_payloads):
        scale = tl.load(scales + row, mask=here, other=0).to(tl.int32)
        if TOP == 0:  # an exponent; 0 is the subnormal 2^-127 and 255 NaN
            scale = tl.where(scale == 255, 0x7FC00000, tl.where(scale == 0, 1 << 22, scale << 23))
        scale = scale.to(tl.float32, bitcast=True)[:, None]
        byte = tl.load(codes + places, mask=here[:, None], other=0)
        if BITS == 8:
            low, high = byte, tl.load(codes + places + HALF, mask=here[:, None], other=0)
            low, high = low.to(tl.int8, bitcast=True).to(tl.float32), high.to(tl.int8, bitcast=True).to(tl.float32)
        elif TOP > 0:
            signed = byte.to(tl.int8, bitcast=True).to(tl.int32)
            low, high = ((signed << 28) >> 28).to(tl.float32), (signed >> 4).to(tl.float32)
        else:
            low, high = _power_values(byte.to(tl.int32) & 15), _power_values(byte.to(tl.int32) >> 4)
        low_sum += low * scale
        high_sum += high * scale
        codes += codes_stride
        scales += scales_stride
    return low_sum, high_sum


@triton.jit(do_not_specialize=["num_blocks", "key", "stride", "offset"])
def quantise_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, num_elements: tl.tensor, num_blocks: tl.tensor, key: tl.tensor,
    stride: tl.tensor, offset: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, CAP: tl.constexpr,
    SEEDED: tl.constexpr,
) -> None:  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    first = tl.program_id(0).to(tl.int64) * ROWS
    places = _places(ROWS, BLOCK, HALF)
    x += first * BLOCK
    left = num_elements - first * BLOCK
    if left >= ROWS * BLOCK:  # all programs but the last: no mask that would narrow its loads
        low, high = tl.load(x + places), tl.load(x + places + HALF)
    else:
        low = tl.load(x + places, mask=places < left, other=0)
        high = tl.load(x + places + HALF, mask=places + HALF < left, other=0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    _encode(low, high, first, num_blocks, codes, scales, key, stride, offset, ROWS, BLOCK, BITS, TOP, CAP, SEEDED)


@triton.jit(do_not_specialize=["num_blocks", "num_payloads"])
def accumulate_kernel(
    codes: tl.tensor, scales: tl.tensor, out: tl.tensor, num_elements: tl.tensor, num_blocks: tl.tensor,
    num_payloads: tl.tensor, codes_stride: tl.tensor, scales_stride: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr,
) -> None:  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    first = tl.program_id(0).to(tl.int64) * ROWS
    low, high = _decode(
        first, num_blocks, num_payloads, codes, scales, codes_stride, scales_stride, ROWS, BLOCK, BITS, TOP
    )
    low, high = low.to(out.dtype.element_ty), high.to(out.dtype.element_ty)
    places = _places(ROWS, BLOCK, HALF)
    out += first * BLOCK
    left = num_elements - first * BLOCK
    if left >= ROWS * BLOCK:
        tl.store(out + places, low)
        tl.store(out + places + HALF, high)
    else:
        tl.store(out + places, low, mask=places < left)
        tl.store(out + places + HALF, high, mask=places + HALF < left)


@triton.jit(do_not_specialize=["num_blocks", "num_payloads", "key", "stride", "offset"])
def requantise_kernel(
    codes: tl.tensor, scales: tl.tensor, codes_out: tl.tensor, scales_out: tl.tensor, num_blocks: tl.tensor,
    num_payloads: tl.tensor, codes_stride: tl.tensor, scales_stride: tl.tensor, key: tl.tensor, stride: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, CAP: tl.constexpr,
    SEEDED: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    low, high = _decode(
        first, num_blocks, num_payloads, codes, scales, codes_stride, scales_stride, ROWS, BLOCK, BITS, TOP
    )
    _encode(
        low, high, first, num_blocks, codes_out, scales_out, key, stride, offset, ROWS, BLOCK, BITS, TOP, CAP, SEEDED
    )


def quantise(x: Tensor, payload: Tensor, format: str, block: int, stream: Stream | None, offset: int) -> None:
    """Writes x, flat and of any of DTYPES, into its payload."""
    if not len(x):
        return
    codes, scales = _split(payload[None], format, block)
    num_blocks = scales.shape[1]
    with torch.cuda.device_of(x):
        quantise_kernel[_grid(num_blocks, block)](
            x.contiguous(), codes, scales, len(x), num_blocks, *(stream or (0, 0)), offset,
            **_constants(format, block, stream is not None), num_warps=NUM_WARPS,
        )  # fmt: skip


def accumulate(payloads: Payloads, out: Tensor, format: str, block: int) -> None:
    """Writes the sum of the payloads' values into `out`, flat and of any of DTYPES; a cast is to the nearest."""
    if not len(payloads[0]):
        return
    codes, scales = _split(_stacked(payloads, format), format, block)
    with torch.cuda.device_of(out):
        accumulate_kernel[_grid(scales.shape[1], block)](
            codes, scales, out, len(out), scales.shape[1], len(codes), codes.stride(0), scales.stride(0),
            **_constants(format, block), num_warps=NUM_WARPS,
        )  # fmt: skip


def requantise(
    payloads: Payloads, payload: Tensor, format: str, block: int, stream: Stream | None, offset: int
) -> None:
    """Writes the payload of the sum of the payloads' values into `payload`."""
    if not len(payloads[0]):
        return
    codes, scales = _split(_stacked(payloads, format), format, block)
    codes_out, scales_out = _split(payload[None], format, block)
    with torch.cuda.device_of(payload):
        requantise_kernel[_grid(scales.shape[1], block)](
            codes, scales, codes_out, scales_out, scales.shape[1], len(codes), codes.stride(0), scales.stride(0),
            *(stream or (0, 0)), offset, **_constants(format, block, stream is not None), num_warps=NUM_WARPS,
        )  # fmt: skip


def _stacked(payloads: Payloads, format: str) -> Tensor:
    """The payloads as rows of one tensor that can be read in place; a list of several is copied together."""
    rows = payloads if isinstance(payloads, Tensor) else payloads[0][None]
    if len(payloads) > len(rows):
        rows = torch.stack(list(payloads))
    aligned = rows.stride(1) == 1 and (rows.data_ptr() | rows.stride(0)) % FORMATS[format].scale_bytes == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _split(rows: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes (payloads, bytes) uint8 and scales (payloads, blocks) of the type they have in memory."""
    kind = FORMATS[format]
    code_bytes = block * kind.bits // 8
    num_blocks = rows.shape[1] // (code_bytes + kind.scale_bytes)
    codes, scales = rows.split([num_blocks * code_bytes, num_blocks * kind.scale_bytes], dim=1)
    return codes, scales.view(torch.int32) if kind.scale_bytes == 4 else scales


def _constants(format: str, block: int, seeded: bool | None = None) -> dict[str, int]:
    """Constants of a kernel; with `seeded`, of one that quantises."""
    kind = FORMATS[format]
    constants = {"ROWS": TILE // block, "BLOCK": block, "BITS": kind.bits, "TOP": kind.top}
    return constants if seeded is None else {**constants, "CAP": kind.cap, "SEEDED": seeded}


def _grid(num_blocks: int, block: int) -> tuple[int]:
    return (triton.cdiv(num_blocks, TILE // block),)


def specimens() -> list[Specimen]:
    """Every kernel in every format at the default block; the smallest and largest blocks where there is most to do."""
    found = []
    for format in FORMATS:
        for dtype in ("fp32", "bf16"):
            found.append(_specimen("accumulate", accumulate_kernel, format, BLOCK, values={"out": dtype}))
        for seeded in (False, True):
            found.append(_specimen("quantise", quantise_kernel, format, BLOCK, seeded, values={"x": "fp32"}))
            found.append(_specimen("requantise", requantise_kernel, format, BLOCK, seeded))
        found.append(_specimen("quantise", quantise_kernel, format, BLOCK, True, values={"x": "bf16"}))
        for block in (min(BLOCKS), max(BLOCKS)):
            found.append(_specimen("requantise", requantise_kernel, format, block, True))
    return found


def _specimen(
    name: str, kernel: Any, format: str, block: int, seeded: bool | None = None, values: dict[str, str] | None = None
) -> Specimen:
    codes, scales = "*u8", "*i32" if FORMATS[format].scale_bytes == 4 else "*u8"
    types = {"codes": codes, "scales": scales, "codes_out": codes, "scales_out": scales}
    types |= {"num_elements": "i64", "codes_stride": "i64", "scales_stride": "i64", "offset": "i64"}
    types |= {argument: f"*{dtype}" for argument, dtype in (values or {}).items()}
    constants = _constants(format, block, seeded)
    return Specimen(
        "_".join([name, format, str(block), *(values or {}).values()] + ["seeded"] * bool(seeded)),
        kernel,
        {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants},
        constants,
        NUM_WARPS,
        unaligned=frozenset({"num_blocks", "num_payloads", "scales_stride", "key", "stride", "offset"}),
    )
