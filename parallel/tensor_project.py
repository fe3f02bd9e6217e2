"""The way in and the projections behind it as one function, so that bytes move while backward computes.

The gradient of hidden starts on its way to the ranks that own the tokens before those of the weights are computed,
which hide it. Autograd alone would do one after the other. Source: Shoeybi et al. 2019; Megatron-LM's overlap.

What was gathered is kept for backward, as each projection alone would keep it; recompute drops it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.parallel.tensor_stream import Grid, Stream


class Enter(nn.Module):
    """Takes the place of `train.model.Enter`: gathers hidden and gives its projections, which `Pick`s tell apart."""

    def __init__(self, layers: Sequence["Pick"], stream: Stream) -> None:
        """`layers` keep their parameters, which are read inside the forward pass, where FSDP has gathered them."""
        super().__init__()
        self.layers, self.project = tuple(layers), torch.compiler.disable(self._project)
        self.stream = stream

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        return self.project(x, grid)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        return _Project.apply(x, grid, self.stream, len(weights), *weights, *biases)


class Pick(nn.Linear):
    """A projection that `Enter` has computed: called with all, it gives its own."""

    number: int

    @classmethod
    def of(cls, layer: nn.Linear, number: int) -> "Pick":
        """With the layer's parameters."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias, made.number = layer.weight, layer.bias, number
        return made

    def forward(self, projections: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        return projections[self.number]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, stream: Stream, count: int, *factors: Any) -> Any:
        full = stream.gather(x, grid)
        weights, biases = factors[:count], factors[count:]
        ctx.stream = stream
        ctx.save_for_backward(full, *weights)
        return tuple(F.linear(full, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        full, *weights = ctx.saved_tensors
        count, needed = len(weights), ctx.needs_input_grad
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        arrive = None
        if needed[0]:
            d_full = flat[0] @ weights[0]
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                d_full.addmm_(gradient, weight)
            arrive = ctx.stream.start_scatter(d_full.view(full.shape))
        inputs = full.view(-1, full.shape[-1])
        of_weights, of_biases = needed[4 : 4 + count], needed[4 + count :]
        d_weights = [g.t() @ inputs if need else None for g, need in zip(flat, of_weights, strict=True)]
        d_biases = [g.sum(0) if need else None for g, need in zip(flat, of_biases, strict=True)]
        return None if arrive is None else arrive(), None, None, None, *d_weights, *d_biases
