"""How near a result must come to float64, and how a call is made that leaves nothing unwritten unseen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from armillary.launch.rows import Row


@contextmanager
def nan_filled() -> Iterator[None]:
    """Every new tensor of floats holds NaN until a kernel has written it."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with ExitStack() as stack:
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, filling(getattr(torch, name))))
        yield


def results(call: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Tensor | None]) -> list[Tensor]:
    """What `call` gives for `inputs`, then the inputs' gradients; a result whose pull is None is left alone."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = call(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    pulled, given = zip(*[pair for pair in zip(outputs, pulls, strict=True) if pair[1] is not None], strict=True)
    gradients = torch.autograd.grad(pulled, leaves, given, allow_unused=True)
    zeros = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True))
    return [tensor.detach() for tensor in [*outputs, *zeros]]


def judge(
    name: str, names: Sequence[str], ours: Sequence[Tensor], peers: Sequence[Tensor], truths: Sequence[Tensor],
    again: Sequence[Tensor],
) -> Row:  # fmt: skip
    """A row: the errors of each result, what was allowed, and whether a second call gave the same bits.

    `ratio` is the largest part of what is allowed that was taken.
    """
    errors, worst, ok = {}, 0.0, True
    for part, a, b, truth in zip(names, ours, peers, truths, strict=True):
        found = lse_errors(a, truth) if part == "lse" else tensor_errors(a, b, truth)
        errors[part] = found
        for error, allowed in (found["largest"], found["mean"]):
            ok = ok and error <= allowed
            worst = max(worst, error / allowed if allowed else float(error > 0) * 1e9)
    equal = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    bad = [part for part, found in errors.items() if any(not error <= most for error, most in found.values())]
    told = [f"too far from float64: {', '.join(bad)}"] * bool(bad) + ["two calls differ in bits"] * (not equal)
    row = {"name": name, "ok": ok and equal, "ratio": worst, "errors": errors, "repeats_equal": equal}
    return row | {"note": "; ".join(told) or "within the rule"}


def tensor_errors(ours: Tensor, peer: Tensor, truth: Tensor) -> dict[str, tuple[float, float]]:
    """(error, allowed) of the largest and the mean."""
    if not truth.numel():
        return {"largest": (0.0, 0.0), "mean": (0.0, 0.0)}
    rounding = torch.finfo(ours.dtype).eps
    error, other = ((t.double() - truth).abs().nan_to_num(nan=torch.inf) for t in (ours, peer))
    size = truth.abs()
    return {
        "largest": (error.max().item(), 2 * other.max().item() + rounding * size.max().item()),
        "mean": (error.mean().item(), 2 * other.mean().item() + rounding * size.mean().item()),
    }


def lse_errors(ours: Tensor, truth: Tensor) -> dict[str, tuple[float, float]]:
    """As above; where the truth is -inf, so must ours be."""
    blind = truth == -torch.inf
    error = torch.where(blind, torch.where(ours == -torch.inf, 0.0, torch.inf), (ours.double() - truth).abs())
    error = error.nan_to_num(nan=torch.inf)
    allowed = 1e-5 * (1 + truth.masked_fill(blind, 0).abs().max().item())
    return {"largest": (error.max().item(), allowed), "mean": (error.mean().item(), allowed)}
