"""Output projection and cross entropy in one, without ever holding the logits of all tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Label of a token that is not predicted."""

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**28}
"""How many logits are held at once: on the CPU what fits its caches, on a GPU enough to keep it busy."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """SUM over labelled tokens of the cross entropy of `hidden @ weight.T`, a 0-d tensor.

    hidden (..., dim), weight (vocab, dim), labels (...) int64; labels equal to IGNORE count nothing, so that a batch
    of them gives exactly 0 and zero gradients. The softmax and the weight's gradient are float32 (float64 for float64
    input), and so is the result. `chunk` tokens are computed at a time, by default as many as suit the device.

    Both gradients are computed in the forward pass, chunk by chunk, while the logits are at hand: three matrix
    products altogether, as without chunks. Source: Liger Kernel (Hsu et al. 2024), which sums the weight's gradient
    in its own dtype; ours is float32.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if chunk is None:
        chunk = max(256, CHUNK_LOGITS.get(hidden.device.type, 2**20) // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, training: bool) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ignored = (labels == IGNORE)[:, None]
        # Ignored rows become zeros: they then add nothing to the weight's gradient, whatever stood in them.
        hidden = hidden.masked_fill(ignored, 0)
        targets = labels[:, None].masked_fill(ignored, 0)
        need_hidden, need_weight = (training and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Kept from chunk to chunk: fresh memory costs the CPU as much as the softmax.
        logits = torch.empty(min(chunk, hidden.shape[0]), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        logs = torch.empty_like(logits, dtype=wide)
        for x, target, skip, d_x in _chunks(chunk, hidden, targets, ignored, d_hidden):
            torch.mm(x, weight.t(), out=logits[: len(x)])
            torch.log_softmax(logits[: len(x)], dim=-1, dtype=wide, out=logs[: len(x)])
            picked = logs[: len(x)].gather(1, target)
            total -= picked.masked_fill(skip, 0).sum()
            if not (need_hidden or need_weight):
                continue
            # The gradient of the logits: softmax, less one at the target.
            slope = logs[: len(x)].exp_().scatter_(1, target, picked.exp() - 1)
            slope = slope if slope.dtype == x.dtype else logits[: len(x)].copy_(slope)
            if d_x is not None:
                torch.mm(slope, weight, out=d_x)
            if d_weight is not None:
                _add_product(d_weight, slope.t(), x)
        ctx.save_for_backward(None if d_hidden is None else d_hidden.masked_fill_(ignored, 0), d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * gradient,
            None if d_weight is None else (d_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _chunks(size: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Rows of all tensors, `size` at a time; None stays None."""
    for start in range(0, len(tensors[0]), size):  # type: ignore[arg-type]
        yield tuple(None if tensor is None else tensor[start : start + size] for tensor in tensors)
