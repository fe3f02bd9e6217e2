"""The way in and the projections behind it as one function, so that bytes move while backward computes.

The gradient of hidden starts on its way to the ranks that own the tokens before those of the weights are computed,
which hide it. Autograd alone would do one after the other. Source: Shoeybi et al. 2019; Megatron-LM's overlap.

What was gathered is kept for backward, as each projection alone would keep it; recompute drops it. A pipeline may put
off the weights' gradients (`pipeline/split_backward.py`): then the way home is not hidden, and nothing moves later.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.parallel.pipeline.later import Later
from armillary.parallel.tensor.stream import Grid, Stream


class Enter(nn.Module):
    """Takes the place of `train.model.transformer.Enter`: gathers hidden and gives its projections, which `Pick`s tell
    apart."""

    def __init__(self, layers: Sequence["Pick"], stream: Stream) -> None:
        """`layers` keep their parameters, which are read inside the forward pass, where FSDP has gathered them."""
        super().__init__()
        self.layers, self.project = tuple(layers), torch.compiler.disable(self._project)
        self.stream, self.later = stream, Later()

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        return self.project(x, grid)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        return _Project.apply(x, grid, self.stream, self.later, len(weights), *weights, *biases)


class Pick(nn.Module):
    """A projection that `Enter` has computed, with a linear layer's parameters: called with all, it gives its own."""

    def __init__(self, layer: nn.Linear, number: int) -> None:
        super().__init__()
        self.weight, self.bias, self.number = layer.weight, layer.bias, number

    def forward(self, projections: tuple[Tensor, ...]) -> Tensor:
        return projections[self.number]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, stream: Stream, later: Later, count: int, *factors: Any) -> Any:
        full = stream.gather(x, grid)
        weights, biases = factors[:count], factors[count:]
        ctx.stream, ctx.later = stream, later
        # As in pipeline/split_backward.py: what is saved may come back detached, and gradients put off need the
        # parameters.
        ctx.layers = tuple(zip(weights, biases, strict=True))
        ctx.save_for_backward(full, *weights)
        return tuple(F.linear(full, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        full, *weights = ctx.saved_tensors
        need_x, count = ctx.needs_input_grad[0], len(weights)
        need = zip(ctx.needs_input_grad[5 : 5 + count], ctx.needs_input_grad[5 + count :], strict=True)
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        arrive = None
        if need_x:
            d_full = flat[0] @ weights[0]
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                d_full.addmm_(gradient, weight)
            arrive = ctx.stream.start_scatter(d_full.view(full.shape))
        inputs = full.view(-1, full.shape[-1])
        pairs = [ctx.later.gradients(*each) for each in zip(ctx.layers, [inputs] * count, flat, need, strict=True)]
        d_weights, d_biases = zip(*pairs, strict=True)
        return None if arrive is None else arrive(), None, None, None, None, *d_weights, *d_biases
