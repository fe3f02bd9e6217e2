"""A backward pass in two parts: to the inputs at once, to the weights of linear layers later.

A schedule that splits backward (zero bubble) wants what other ranks wait for first. Here a linear layer's node computes
the gradient of its input and puts off that of its weight: it keeps the layer's input and the gradient of its output.
Everything else, whose weights' gradients cost little (norms, embedding) or are known since the forward pass (the loss),
is computed in the first part. So the graph is run once and freed: what is recomputed is recomputed once, and functions
of our own need no care. torch's way (`stage_backward_input`, `stage_backward_weight`) runs parts of the graph twice,
which repeats whatever a Python function computes and a recomputed block altogether, and keeps the whole graph until
the second part. Source of the split: Zero Bubble Pipeline Parallelism (Qi et al. 2024, arXiv 2401.10241).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.function import once_differentiable

from armillary.parallel.tensor.project import Enter

Owed = list[tuple[Tensor, Tensor | None, Tensor, Tensor]]
"""Weight (out, in), bias, input (tokens, in), gradient of the output (tokens, out), of each layer."""


class Later:
    """Where a stage's linear layers put what they owe; None while they are to compute it at once."""

    def __init__(self) -> None:
        self.owed: Owed | None = None


def split_backward(module: nn.Module) -> Later:
    """Makes the linear layers of a module able to put off their weights' gradients; returns where they do.

    So are the projections of tensor ranks (tensor/project.py). Layers whose `forward` is not `nn.Linear`'s own, and
    those inside a compiled module, compute all at once, as before: then the first part does everything and the second
    nothing. Parameters and names stay.
    """
    later = Later()
    _split(module, later)
    return later


def _split(module: nn.Module, later: Later) -> None:
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
        return
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        module.forward = partial(_forward, module, later)  # type: ignore[method-assign]
    elif isinstance(module, Enter):
        module.later = later
    for child in module.children():
        _split(child, later)


def _forward(layer: nn.Linear, later: Later, x: Tensor) -> Tensor:
    return _Linear.apply(x, layer.weight, layer.bias, later)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Later) -> Tensor:
        # A recomputed block saves detached tensors in its second pass, so the parameters are kept as they are, too.
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.later = (weight, bias), later
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        d_x = gradient @ weight if need_x else None
        num_rows = x.shape[:-1].numel()
        rows, d_rows = (tensor.reshape(num_rows, tensor.shape[-1]) for tensor in (x, gradient))
        if ctx.later.owed is not None and need_weight:
            ctx.later.owed.append((ctx.parameters[0], ctx.parameters[1] if need_bias else None, rows, d_rows))
            return d_x, None, None, None
        return d_x, d_rows.t() @ rows if need_weight else None, d_rows.sum(0) if need_bias else None, None


@torch.no_grad()
def pay(owed: Owed) -> None:
    """Adds the gradients that were put off to the parameters'; empties the list as it goes."""
    while owed:
        weight, bias, rows, d_rows = owed.pop()
        if weight.grad is None:
            weight.grad = d_rows.t() @ rows
        else:
            weight.grad.addmm_(d_rows.t(), rows)
        if bias is not None:
            total = d_rows.sum(0)
            bias.grad = total if bias.grad is None else bias.grad.add_(total)
