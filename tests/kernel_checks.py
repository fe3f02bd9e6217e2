"""What tests of Triton kernels share: results as exact as plain torch's, written whole, the same bits every time."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """ARMILLARY_KERNELS is `choice`, and every new tensor holds NaN until a kernel has written it."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ARMILLARY_KERNELS": choice}))
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, nan_filled(getattr(torch, name))))
        yield


def nan_filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made


def leaves(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Normal numbers that take a gradient, on the GPU where there is one."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in numbers]


def results(call: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Tensor | None]) -> list[Tensor]:
    """What `call` gives for `inputs`, then the inputs' gradients; a result whose pull is None is left alone."""
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pulled = {out: pull for out, pull in zip(outputs, pulls, strict=True) if pull is not None}
    gradients = torch.autograd.grad(list(pulled), list(inputs), list(pulled.values()), allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))]


def check(
    operation: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Any]
) -> None:
    """`ours` by Triton against `plain` torch, results and gradients: as exact, twice the same, all written."""
    with kernels(f"{operation}=triton"):
        got, again = results(ours, inputs, pulls), results(ours, inputs, pulls)
    peers = results(plain, inputs, pulls)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truths = results(plain, wide, [None if pull is None else pull.double() for pull in pulls])
    for first, second, peer, truth in zip(got, again, peers, truths, strict=True):
        assert torch.equal(first, second)
        assert first.dtype == peer.dtype
        assert_as_exact(first, peer, truth)


def assert_as_exact(ours: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, in the largest and in the mean, and one rounding."""
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    rounding = torch.finfo(ours.dtype).eps
    error, allowed = ((t.double() - truth).abs() for t in (ours, peer))
    assert error.max() <= 2 * allowed.max() + rounding * truth.abs().max()
    assert error.mean() <= 2 * allowed.mean() + rounding * truth.abs().mean()
