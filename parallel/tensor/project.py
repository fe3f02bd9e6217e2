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

from armillary.parallel.tensor.stream import Grid, Stream


class Enter(nn.Module):
    """Takes the place of `train.model.transformer.Enter`: gathers hidden and gives its projections, which `Pick`s tell
    apart."""

    def __init__(self, layers: Sequence["Pick"], stream: Stream) -> None:
        """`layers` keep their parameters, which are read inside the forward pass, where FSDP has gathered them."""
        super().__init__()
        self.layers, self.project = tuple(layers), torch.compiler.disable(self._project)
        self.stream = stream
        self.later: Any = None
        """A pipeline's `pipeline_split.Later`."""

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        return self.project(x, grid)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        return _Project.apply(x, grid, self.stream, self.later, len(weights), *weights, *biases)


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
    def forward(ctx: Any, x: Tensor, grid: Grid, stream: Stream, later: Any, count: int, *factors: Any) -> Any:
        full = stream.gather(x, grid)
        weights, biases = factors[:count], factors[count:]
        ctx.stream, ctx.later, ctx.count = stream, later, count
        # As in pipeline/split_backward.py: what is saved may come back detached, and gradients put off need the
        # parameters.
        ctx.factors = None if later is None else factors
        ctx.save_for_backward(full, *weights)
        return tuple(F.linear(full, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        full, *weights = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        arrive = None
        if need_x:
            d_full = flat[0] @ weights[0]
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                d_full.addmm_(gradient, weight)
            arrive = ctx.stream.start_scatter(d_full.view(full.shape))
        d_factors = _of_factors(ctx, full.view(-1, full.shape[-1]), flat, need)
        return None if arrive is None else arrive(), None, None, None, None, *d_factors


def _of_factors(ctx: Any, inputs: Tensor, gradients: list[Tensor], need: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the weights, then of the biases; None for those that are put off."""
    count = ctx.count
    if ctx.later is None or ctx.later.owed is None:
        d_weights = [g.t() @ inputs if needed else None for g, needed in zip(gradients, need[:count], strict=True)]
        return d_weights + [g.sum(0) if needed else None for g, needed in zip(gradients, need[count:], strict=True)]
    for number, gradient in enumerate(gradients):
        if need[number]:
            bias = ctx.factors[count + number] if need[count + number] else None
            ctx.later.owed.append((ctx.factors[number], bias, inputs, gradient))
    return [None] * 2 * count
