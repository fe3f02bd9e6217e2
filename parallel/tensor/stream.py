"""The residual stream as tensor ranks share it (sequence parallelism), and the ways in and out of it.

Between blocks a rank holds flat tokens (rows, dim), see `tensor/cuts.py`. Before projections all ranks gather
all tokens; after them each has a sum over its own heads or channels, (batch, seq, dim), and the ranks' sums are added
and shared out again. Each way is the other's backward. Source: Korthikanti et al. 2022 (sequence parallelism).

What travels has the dtype of the stream. On the CPU it is added in float32 and rounded once, so that in bfloat16 a sum
differs from one process's by the rounding of the summands alone; NCCL rounds at each of its hops.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.comm.collectives import all_gather, start_reduce_scatter
from armillary.comm.ledger import Ledger
from armillary.parallel.tensor.cuts import hidden_shape

PURPOSE = "tensor"
"""What the ledger counts activations for."""

Grid = tuple[int, int]
"""Rows and tokens a row."""


class Stream:
    """Moves hidden between a rank's own tokens and all tokens; differentiable."""

    def __init__(self, group: dist.ProcessGroup, ledger: Ledger) -> None:
        self.group, self.ledger = group, ledger
        # A compiled block breaks here. Not as decorators: they load the compiler, half a second, for whoever imports.
        self.enter = torch.compiler.disable(self._enter)
        self.leave = torch.compiler.disable(self._leave)

    def _enter(self, x: Tensor, grid: Grid) -> Tensor:
        """(rows, dim) of each rank -> (batch, seq, dim), the same on all ranks. Gradients are partial sums."""
        return _Enter.apply(x, grid, self)

    def _leave(self, x: Tensor) -> Tensor:
        """Partial sums (batch, seq, dim) -> the rank's own tokens of their sum, (rows, dim)."""
        return _Leave.apply(x, self)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        full = x.new_empty(self.group.size() * x.shape[0], x.shape[1])
        if x.numel():
            shard = x.contiguous().view(-1)
            all_gather(full.view(-1), shard, group=self.group, ledger=self.ledger, purpose=PURPOSE)
        return full[: grid[0] * grid[1]].view(*grid, x.shape[1])

    def scatter(self, x: Tensor) -> Tensor:
        return self.start_scatter(x)()

    def start_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts to add up partial sums (batch, seq, dim); call what it returns to wait for the rank's own tokens."""
        num_ranks = self.group.size()
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(hidden_shape((x.shape[0], x.shape[1]), x.shape[2], num_ranks))
        if len(flat) < num_ranks * len(out):
            flat = torch.nn.functional.pad(flat, (0, 0, 0, num_ranks * len(out) - len(flat)))
        if not out.numel():
            return lambda: out
        pieces = flat.contiguous().view(-1)
        flight = start_reduce_scatter(out.view(-1), pieces, group=self.group, ledger=self.ledger, purpose=PURPOSE)

        def wait() -> Tensor:
            flight.wait()
            return out

        return wait


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, stream: Stream) -> Tensor:
        ctx.stream = stream
        return stream.gather(x, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.stream.scatter(gradient), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Stream) -> Tensor:
        ctx.stream, ctx.grid = stream, (x.shape[0], x.shape[1])
        return stream.scatter(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.stream.gather(gradient, ctx.grid), None


class Leave(nn.Module):
    """Takes the place of `train.model.transformer.Leave`."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        return self.stream.leave(x)
