"""A backward pass in two parts: to the inputs at once, to the weights of linear layers later.

A schedule that splits backward (zero bubble) wants what other ranks wait for first. Here a linear layer's node computes
the gradient of its input and puts off that of its weight (pipeline/later.py).
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

from armillary.parallel.pipeline.later import Later
from armillary.parallel.tensor.project import Enter


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
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None or _is_compiled(module):
        return
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        module.forward = partial(_forward, module, later)  # type: ignore[method-assign]
    elif isinstance(module, Enter):
        module.later = later
    for child in module.children():
        _split(child, later)


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is a block of ours that is compiled inside."""
    return bool(getattr(module, "compiled", False))


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
        return d_x, *ctx.later.gradients(ctx.parameters, rows, d_rows, (need_weight, need_bias)), None
