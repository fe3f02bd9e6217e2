"""What tests of Triton kernels share: results as exact as plain torch's, written whole, the same bits every time."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from armillary.launch.bench_gpu.compare import judge, nan_filled, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """ARMILLARY_KERNELS is `choice`, and every new tensor holds NaN until a kernel has written it."""
    with mock.patch.dict(os.environ, {"ARMILLARY_KERNELS": choice}), nan_filled():
        yield


def leaves(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Normal numbers that take a gradient, on the GPU where there is one."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in numbers]


def check(
    operation: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Any]
) -> None:
    """`ours` by Triton against `plain` torch, results and gradients, by the rule of `bench gpu`: as exact, twice the
    same, all written."""
    with kernels(f"{operation}=triton"):
        got, again = (results(ours, inputs, pulls) for _ in range(2))
    peers = results(plain, inputs, pulls)
    truths = results(
        plain, [tensor.double() for tensor in inputs], [None if pull is None else pull.double() for pull in pulls]
    )
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in peers]
    row = judge(operation, [f"result {i}" for i in range(len(got))], got, peers, truths, again)
    assert row["ok"], row
