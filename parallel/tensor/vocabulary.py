"""Embedding and head whose matrix tensor ranks share out by vocabulary rows.

Shapes: tokens, labels (batch, seq), the same on all ranks of the group; hidden (rows, dim), see `tensor/stream.py`.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.comm.collectives import all_gather, all_reduce
from armillary.kernels.cross_entropy import linear_cross_entropy
from armillary.kernels.vocab_shard import VocabShard
from armillary.parallel.cut import Cut
from armillary.parallel.tensor.stream import PURPOSE, Grid, Stream


class VocabEmbedding(nn.Module):
    """Takes the place of `nn.Embedding`: each rank looks up the tokens whose rows it holds."""

    def __init__(self, weight: nn.Parameter, first: int, stream: Stream) -> None:
        """`weight` (own rows, dim); `first` is the token of its row 0."""
        super().__init__()
        self.weight, self.first, self.stream = weight, first, stream

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, dim) of tokens (batch, seq). A token beyond the vocabulary gives zeros."""
        rows = self.weight.shape[0]
        if not rows:  # still a part of the graph: this rank must take part in backward
            return self.stream.leave(self.weight.sum() + self.weight.new_zeros(*tokens.shape, self.weight.shape[1]))
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.stream.leave(found.masked_fill(elsewhere[..., None], 0))


class VocabHead(nn.Module):
    """Takes the place of `train.model.transformer.Head`. The loss is whole and equal on all ranks of the group, so it
    counts once; so are the logits."""

    def __init__(self, cut: Cut, stream: Stream) -> None:
        super().__init__()
        self.cut, self.stream = cut, stream
        first, _ = cut.parts[stream.group.rank()]
        largest = max(size for _, size in cut.parts)
        self.shard = VocabShard(first, largest, self._maximum, self._sum)

    def forward(self, x: Tensor, weight: Tensor, labels: Tensor | None, grid: Grid) -> Tensor:
        """Hidden (rows, dim) and the own rows of the matrix -> the loss's sum, or logits (batch, seq, vocab)."""
        x = self.stream.enter(x, grid)
        if labels is not None:
            return linear_cross_entropy(x, weight, labels, shard=self.shard)
        return _Logits.apply(F.linear(x, weight), self.cut, self.stream)

    def _maximum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        return all_reduce(tensor, group=self.stream.group, ledger=self.stream.ledger, purpose=PURPOSE, op=operation)


class _Logits(torch.autograd.Function):
    """Puts the ranks' logits side by side. Its gradient is that of a result that all ranks have and count once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cut: Cut, stream: Stream) -> Tensor:
        group, sizes = stream.group, [size for _, size in cut.parts]
        ctx.own = cut.parts[group.rank()]
        own = F.pad(logits, (0, max(sizes) - logits.shape[-1])).contiguous()
        all_own = own.new_empty(len(sizes), *own.shape)
        if own.numel():
            all_gather(all_own.view(-1), own.view(-1), group=group, ledger=stream.ledger, purpose=PURPOSE)
        return torch.cat([part[..., :size] for part, size in zip(all_own, sizes, strict=True)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.narrow(-1, *ctx.own), None, None
