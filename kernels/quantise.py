"""Block-wise int8, int4 and E3M0 payloads for communication: packed bytes, the same bits on every device.

A flat tensor is cut into blocks of `block` values, the last one filled up with zeros. A payload is one uint8 tensor,
the codes of all blocks and then their scales. Every value is `level x scale`:

    int8   -127 .. 127, a byte, two's complement; the scale a float32 (little endian)
    int4   -7 .. 7, a nibble, two's complement; the scale a float32
    e3m0   0 and +-1, 2, 4 .. 64, a nibble `sign << 3 | e`: zero for e = 0, else 2^(e - 1); the scale a power of two, as
           one byte, its exponent + 127 (E8M0 of OCP's MX). Zero is worth one of eight magnitudes: what did not move has
           a delta of exactly zero, and must keep it. The nibble 8 (-0) is never written; it reads as 0.
Byte j of a block of nibbles holds value j (low) and value j + block / 2 (high): both halves are contiguous.

The bits, for other implementations. All is float32 (float64 is rounded to it first), rounded to nearest, ties to even.
- a: the largest magnitude in the block. If it is not finite, the scale is NaN (0x7FC00000; byte 255) and all codes 0.
- s, int8 and int4: the smallest number of 16 significant bits with top x s >= a (top = 127, 7), but at least 2^-96 and
  at most the largest with top x s finite. 16 bits make level x s exact: sums are the same with and without fused
  multiply-add, and quantising again gives the same payload.
- Level: round(x * r), r = 1 / s (rounded; the only division). Seeded: floor((z + (noise >> 16)) / 2^16), where z is
  round(x * (r * 2^16)) held within +-top * 2^16.
- s, e3m0: 64 s is the power of two nearest to a (2^k for 1.5 x 2^k; seeded: the least not below a), 2^-96 to 2^127.
- e: with y = |x| / s, z = min(7 * 2^23, max(bits(y) - bits(0.5), round(2^23 * min(y, 1)))) is 2^23 e at the levels and
  linear in between; e = round(z / 2^23). Seeded: floor((z + (noise >> 9)) / 2^23).
- noise, 32 bits: unsigned integers modulo 2^32; high and low are the halves of 64 bits.
      mix(h):  h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B    (C. Wellons's lowbias32)
      key = mix(mix(low(seed) + 0x9E3779B9) + high(seed));  stride = mix(key + 0x9E3779B9) | 1
      noise of value j of a block that starts at global index i = mix(mix(key + high(i)) + (low(i) + j) * stride)
A device that flushes subnormals gives the same bits: the least scale makes all below 2^-126 zero anyway.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.kernels.select import use_triton

BLOCK = 128
"""Values that share a scale, unless told otherwise."""
BLOCKS = (32, 64, 128, 256, 512, 1024)
"""Sizes a block may have."""
CHUNK_VALUES = {"cpu": 2**17, "cuda": 2**22}
"""How many values are worked on at once: what stays in the second-level cache."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Types of the values that are quantised; other types of sums take the plain torch path."""
LOWEST = 31
"""Biased exponent of 2^-96: the least scale of integers, the least top level of e3m0."""
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""Shifts and factors of the noise's scrambler."""
Payloads = Sequence[Tensor] | Tensor
"""One or more payloads of as many values: tensors (payload_bytes,), or the rows of one, which a GPU need not copy."""
Stream = tuple[int, int]
"""What a seed's noise depends on, key and stride, as int32."""
_Noise = tuple[Tensor, Tensor] | None
"""int32 (blocks, 1) and (block,), whose sums are to be mixed into the noise; None without a seed."""


@dataclass(frozen=True)
class _Format:
    bits: int
    scale_bytes: int
    fraction: int
    """Bits of noise in a seeded rounding."""
    top: int = 0
    """The largest integer level; 0 for e3m0."""
    cap: int = 0
    """The largest scale, as bits."""


FORMATS = {
    "int8": _Format(8, 4, 16, top=127, cap=0x7C010200),
    "int4": _Format(4, 4, 16, top=7, cap=0x7E124900),
    "e3m0": _Format(4, 1, 23),
}


def payload_bytes(num_elements: int, format: str, block: int = BLOCK) -> int:
    """Exact size of the payload of `num_elements` values: each block begun costs all its codes and its scale."""
    if format not in FORMATS or block not in BLOCKS:
        raise ValueError(f"quantise: {format!r} in blocks of {block}; allowed are {', '.join(FORMATS)} and {BLOCKS}")
    return -(-num_elements // block) * (block * FORMATS[format].bits // 8 + FORMATS[format].scale_bytes)


def quantise(x: Tensor, format: str, block: int = BLOCK, seed: int | None = None, offset: int = 0) -> Tensor:
    """The payload (payload_bytes,) uint8 of `x`, a flat float32, bfloat16 or float64 tensor.

    Without `seed` to the nearest level, a tie to the even code; with it (64 bits) up or down with the
    probability that makes the mean right, by (seed, offset + index) alone: chunks cut between blocks, each with its
    offset, give the bits of the whole. Ranks that are summed need seeds of their own, or their errors add up.

    With s the block's scale and a its largest magnitude, a value's error (and that of its mean over seeds) is at most
    - int8, int4: 0.50002 s, seeded 1.00004 s (2^-15 s), where s <= max(a / top x (1 + 2^-15), 2^-96);
    - e3m0: max(|x| / 3, 0.50001 s), seeded max(|x|, s) (2^-22 s), where 64 s <= max(4/3 a, seeded 2 a, 2^-96).
    Where a times 1.000004 (e3m0: 2) is more than float32 holds, what is beyond the top level becomes it.
    A value that is not finite (as float32) makes its whole block NaN.
    """
    if x.dim() != 1 or x.dtype not in DTYPES:
        raise ValueError(f"quantise: flat float32, bfloat16 or float64 is allowed, not {x.dtype} {tuple(x.shape)}")
    payload = torch.empty(payload_bytes(len(x), format, block), dtype=torch.uint8, device=x.device)
    stream = _stream(seed)
    if use_triton("quantise", payload):  # not x: the kernels take float64, too
        from armillary.kernels import quantise_triton

        quantise_triton.quantise(x.detach(), payload, format, block, stream, offset)
        return payload
    noise = _noise(stream, offset, len(x), block, x.device)
    for start, stop, rows, work in _chunks(len(x), block, x.device):
        _encode(_rows(x.detach()[start:stop], work[0]), payload, FORMATS[format], rows, work, noise)
    return payload


def accumulate(
    payloads: Payloads, num_elements: int, format: str, block: int = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """float32 sum (num_elements,) of the payloads' values, in the order given: give them by rank. Returned as dtype.

    Of one payload these are its values: exact in float32 and float64, rounded in other dtypes.
    """
    _check_sizes(payloads, payload_bytes(num_elements, format, block))
    out = torch.empty(num_elements, dtype=dtype, device=payloads[0].device)
    if dtype in DTYPES and use_triton("quantise", payloads[0]):
        from armillary.kernels import quantise_triton

        quantise_triton.accumulate(payloads, out, format, block)
        return out
    for start, stop, rows, work in _chunks(num_elements, block, out.device):
        out[start:stop] = _decode(payloads, FORMATS[format], rows, work).view(-1)[: stop - start]
    return out


def requantise(
    payloads: Payloads, num_elements: int, format: str, block: int = BLOCK, seed: int | None = None, offset: int = 0
) -> Tensor:
    """`quantise(accumulate(payloads))`, a chunk at a time, so that the sum is never held."""
    _check_sizes(payloads, payload_bytes(num_elements, format, block))
    out = torch.empty_like(payloads[0])
    stream = _stream(seed)
    if use_triton("quantise", out):
        from armillary.kernels import quantise_triton

        quantise_triton.requantise(payloads, out, format, block, stream, offset)
        return out
    noise = _noise(stream, offset, num_elements, block, out.device)
    for _, _, rows, work in _chunks(num_elements, block, out.device):
        _encode(_decode(payloads, FORMATS[format], rows, work), out, FORMATS[format], rows, work, noise)
    return out


def _check_sizes(payloads: Payloads, size: int) -> None:
    wrong = [f"{p.dtype} {tuple(p.shape)}" for p in payloads if p.dtype != torch.uint8 or p.shape != (size,)]
    if wrong or not len(payloads):
        raise ValueError(f"quantise: these payloads must be torch.uint8 ({size},), not {wrong[0] if wrong else 'none'}")


def _chunks(num_elements: int, block: int, device: torch.device) -> Iterator[tuple[int, int, slice, Tensor]]:
    """(start, stop) of the values of some whole blocks, those blocks, and room to work: 4 x (blocks, block) int32."""
    num_blocks = -(-num_elements // block)
    size = max(1, min(CHUNK_VALUES.get(device.type, 2**22) // block, num_blocks))
    work = torch.empty(4, size, block, dtype=torch.int32, device=device)  # once: fresh memory costs more than the maths
    for row in range(0, num_blocks, size):
        rows = slice(row, min(row + size, num_blocks))
        yield row * block, min(rows.stop * block, num_elements), rows, work[:, : rows.stop - row]


def _rows(x: Tensor, room: Tensor) -> Tensor:
    """x as float32 (blocks, block), filled up with zeros: itself where that is possible, else in `room`."""
    if x.dtype == torch.float32 and len(x) == room.numel():
        return x.view(room.shape)
    rows = room.view(torch.float32)
    rows.view(-1)[: len(x)] = x
    rows.view(-1)[len(x) :] = 0
    return rows


def _split(payload: Tensor, kind: _Format, block: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Codes (blocks, bytes) int8 and scales (blocks, bytes) uint8 of the blocks `rows` of a payload."""
    code_bytes = block * kind.bits // 8
    num_blocks = len(payload) // (code_bytes + kind.scale_bytes)
    codes, scales = payload.split([num_blocks * code_bytes, num_blocks * kind.scale_bytes])
    return codes.view(torch.int8).view(num_blocks, code_bytes)[rows], scales.view(num_blocks, kind.scale_bytes)[rows]


def _encode(x: Tensor, payload: Tensor, kind: _Format, rows: slice, work: Tensor, noise: _Noise) -> None:
    """Writes x (blocks, block), which may lie in work[0], into the blocks `rows` of a payload."""
    codes, scales = _split(payload, kind, x.shape[1], rows)
    if noise is not None:
        mixed = _mix(torch.add(noise[0][rows], noise[1], out=work[3]), work[2])
        mixed.bitwise_right_shift_(32 - kind.fraction).bitwise_and_((1 << kind.fraction) - 1)
    largest = torch.abs(x, out=work[1].view(torch.float32)).amax(1, keepdim=True)
    levels, scale = (_integers if kind.top else _powers)(x, largest, kind, work, noise is not None)
    if kind.bits == 8:
        codes.copy_(levels)
    else:
        low, high = levels.to(torch.int8).chunk(2, dim=1)
        torch.bitwise_left_shift(high, 4, out=codes).bitwise_or_(low & 15)
    broken = ~largest.isfinite()
    if x.is_cuda or broken.any():  # on a GPU, asking would wait for it
        codes.masked_fill_(broken, 0)
        scale.masked_fill_(broken, 0x7FC00000 if kind.top else 255)
    scales.copy_(scale.view(torch.uint8) if kind.top else scale)


def _integers(x: Tensor, largest: Tensor, kind: _Format, work: Tensor, seeded: bool) -> tuple[Tensor, Tensor]:
    """Levels (blocks, block) of any dtype, and the bits of the scales (blocks, 1) int32."""
    # A little less than largest / top, so that rounded up to 16 bits it is the scale or just one step short of it.
    scale = ((largest * ((1 - 2**-22) / kind.top)).view(torch.int32) + 0xFF) & ~0xFF
    scale += (scale.view(torch.float32) * kind.top < largest) * 0x100
    scale.clamp_(LOWEST << 23, kind.cap)
    inverse = scale.view(torch.float32).reciprocal()
    if not seeded:
        return torch.mul(x, inverse, out=work[1].view(torch.float32)).round_(), scale
    limit = kind.top << kind.fraction
    value = torch.mul(x, inverse * 2.0**kind.fraction, out=work[1].view(torch.float32)).clamp_(-limit, limit)
    return work[2].copy_(value.round_()).add_(work[3]).bitwise_right_shift_(kind.fraction), scale


def _powers(x: Tensor, largest: Tensor, kind: _Format, work: Tensor, seeded: bool) -> tuple[Tensor, Tensor]:
    """Nibbles (blocks, block) int8, and the exponents of the scales (blocks, 1) int32, 127 added; |x| in work[1]."""
    scale = (largest.view(torch.int32) + (0x7FFFFF if seeded else 0x3FFFFF) >> 23).clamp_(LOWEST, 254).sub_(6)
    # y is |x| / s * 2^23: its factor's exponent is that of 1 / s, and 23 more. Adding 2^23 rounds it to an integer.
    y = work[1].view(torch.float32).mul_(((277 - scale) << 23).view(torch.float32))
    torch.clamp(y, max=2**23, out=work[2].view(torch.float32)).add_(2**23)
    fixed = torch.maximum(work[1], work[2].sub_(1 << 23), out=work[2]).sub_(149 << 23).clamp_(max=7 << 23)
    noise = work[3] if seeded else torch.bitwise_right_shift(fixed, 23, out=work[1]).bitwise_and_(1).add_(0x3FFFFF)
    codes = fixed.add_(noise).bitwise_right_shift_(23).to(torch.int8)
    signs = torch.bitwise_right_shift(x.view(torch.int32), 28, out=work[1]).to(torch.int8)
    return codes | (codes + 7 & 8 & signs), scale  # codes + 7 has bit 3 where there is a sign: not at zero


def _decode(payloads: Payloads, kind: _Format, rows: slice, work: Tensor) -> Tensor:
    """float32 sum (blocks, block), in work[0], of the payloads' blocks `rows`, in their order."""
    total, values = work[0].view(torch.float32), work[1].view(torch.float32)
    for i, payload in enumerate(payloads):
        codes, scales = _split(payload, kind, work.shape[2], rows)
        scale = scales.clone().view(torch.float32 if kind.top else torch.float8_e8m0fnu).float()
        if i == 0:
            total.copy_(_levels(codes, kind)).mul_(scale)
        else:  # the product is exact, so that fused or not there is one rounding
            total.addcmul_(values.copy_(_levels(codes, kind)), scale)
    return total


def _levels(codes: Tensor, kind: _Format) -> Tensor:
    """Levels (blocks, block) int8 of codes (blocks, bytes) int8."""
    if kind.bits == 8:
        return codes
    levels = torch.cat([codes << 4, codes], dim=1) >> 4
    if kind.top:
        return levels
    powers = torch.bitwise_left_shift(levels.new_ones((), dtype=torch.uint8), (levels & 7).view(torch.uint8)) >> 1
    return powers.view(torch.int8) * (levels >> 3 | 1)


def _stream(seed: int | None) -> Stream | None:
    if seed is None:
        return None
    key = _mix_number(_mix_number(seed + 0x9E3779B9) + (seed >> 32))
    stride = _mix_number(key + 0x9E3779B9) | 1
    return key - (key >> 31 << 32), stride - (stride >> 31 << 32)


def _noise(stream: Stream | None, offset: int, num_elements: int, block: int, device: torch.device) -> _Noise:
    if stream is None:
        return None
    key, stride = stream
    index = torch.arange(offset, offset + num_elements, block, device=device)[:, None]  # to int32: its low 32 bits
    starts = _mix((index >> 32).to(torch.int32) + key) + index.to(torch.int32) * stride
    return starts, torch.arange(block, device=device, dtype=torch.int32) * stride


def _mix_number(h: int) -> int:
    for shift, factor in MIX:
        h &= 0xFFFFFFFF
        h = (h ^ h >> shift) * factor
    return h & 0xFFFFFFFF


def _mix(h: Tensor, spare: Tensor | None = None) -> Tensor:
    """Scrambles an int32 tensor in place; the masks make its shifts fill with zeros."""
    for shift, factor in MIX:
        shifted = torch.bitwise_right_shift(h, shift, out=spare).bitwise_and_(0xFFFFFFFF >> shift)
        h.bitwise_xor_(shifted).mul_(factor - (factor >> 31 << 32))
    return h
