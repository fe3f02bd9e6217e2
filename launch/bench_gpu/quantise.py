"""The quantisers on the card: the CPU's bits, and their speed by the bytes that each must move."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from armillary.kernels import quantise as codes
from armillary.launch.bench_gpu.timing import Setting, measure
from armillary.launch.rows import Row

PAYLOADS = 8
"""As many ranks are summed."""


def quantise_rows(setting: Setting, copy: float) -> list[Row]:
    """quantise, accumulate and requantise in each format; seeded, as the trainer does."""
    from armillary.launch.bench_gpu.layers import row_of

    size = 1 << 26 if not setting.dry else 1000
    x = torch.randn(size, device=setting.device)
    rows = []
    for format in codes.FORMATS:
        payloads = torch.stack(
            [codes.quantise(x, format, seed=rank) for rank in range(PAYLOADS if not setting.dry else 2)]
        )
        code = payloads.shape[1]
        works: dict[str, tuple[Callable[[], Any], int]] = {
            "quantise": (partial(codes.quantise, x, format, seed=1), 4 * size + code),
            "accumulate": (
                partial(codes.accumulate, payloads, size, format),
                payloads.numel() + 4 * size,
            ),
            "requantise": (
                partial(codes.requantise, payloads, size, format, seed=1),
                payloads.numel() + code,
            ),
        }
        for name, (call, moved) in works.items():
            times = measure({"ours": call, "plain": partial(_by_torch, call)}, setting)
            rows.append(row_of(f"{name} {format}, {len(payloads)} payloads", times, moved, copy))
    return rows


def same_bits(setting: Setting) -> list[Row]:
    """Payloads, their sums, and payloads of sums: the bits of plain torch on the CPU."""
    size = 1000 if setting.dry else 1_000_003
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, size)
    rows = []
    for format in codes.FORMATS:
        for seed in (None, 12345678901):
            for dtype in (torch.float32, torch.float64) if setting.dry else codes.DTYPES:
                same = _equal(setting, x.to(dtype), format, seed)
                told = f"quantise {format} {str(dtype).removeprefix('torch.')}{' seeded' * (seed is not None)}"
                bad = [name for name, equal in same.items() if not equal]
                note = f"other bits than the CPU's: {', '.join(bad)}" if bad else "the CPU's bits"
                rows.append({"name": told, "ok": not bad, "equal_bits": same, "note": note})
    return rows


def _equal(setting: Setting, x: Tensor, format: str, seed: int | None) -> dict[str, bool]:
    from armillary.kernels import quantise_triton

    size, block = x.shape[1], codes.BLOCK
    stream, there = codes._stream(seed), x.to(setting.device)
    # Called by name: the environment asks for Triton everywhere, and the CPU's side must not have it.
    wanted = torch.stack([_by_torch(codes.quantise, row, format, block, seed, 7 * block) for row in x])
    got = torch.empty_like(wanted, device=setting.device)
    for row, payload in zip(there, got, strict=True):
        quantise_triton.quantise(row, payload, format, block, stream, 7 * block)
    total = torch.full((size,), torch.nan, device=setting.device)
    quantise_triton.accumulate(got, total, format, block)
    again = torch.empty_like(got[0])
    quantise_triton.requantise(got, again, format, block, stream, 0)
    return {
        "payload": torch.equal(got.cpu(), wanted),
        "sum": torch.equal(total.cpu(), _by_torch(codes.accumulate, wanted, size, format, block)),
        "payload of the sum": torch.equal(again.cpu(), _by_torch(codes.requantise, wanted, size, format, block, seed)),
    }


def _by_torch(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """On whatever device the arguments are."""
    with mock.patch.object(codes, "use_triton", return_value=False):
        return function(*arguments)
