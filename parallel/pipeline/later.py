"""Gradients of weights that may be computed later than the rest of a backward pass.

What a layer owes is kept until it is paid: its input, and the gradient of its output.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Owed(NamedTuple):
    """What one layer owes for one micro-batch."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    inputs: Tensor
    """(tokens, in)"""
    gradient: Tensor
    """Of the layer's output (tokens, out)."""


class Later:
    """Where the layers of a stage put what they owe; `owed` is None while they are to compute it at once."""

    def __init__(self) -> None:
        self.owed: list[Owed] | None = None

    def gradients(
        self, layer: tuple[Tensor, Tensor | None], inputs: Tensor, gradient: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a layer's weight and bias, where they are needed; None for what is put off."""
        need_weight, need_bias = need
        if self.owed is not None and need_weight:
            weight, bias = layer
            self.owed.append(Owed(weight, bias if need_bias else None, inputs, gradient))
            return None, None
        return gradient.t() @ inputs if need_weight else None, gradient.sum(0) if need_bias else None


@torch.no_grad()
def pay(owed: list[Owed]) -> None:
    """Adds the gradients that were put off to the parameters'; empties the list as it goes."""
    while owed:
        weight, bias, inputs, gradient = owed.pop()
        if weight.grad is None:
            weight.grad = gradient.t() @ inputs
        else:
            weight.grad.addmm_(gradient.t(), inputs)
        if bias is not None:
            total = gradient.sum(0)
            bias.grad = total if bias.grad is None else bias.grad.add_(total)
