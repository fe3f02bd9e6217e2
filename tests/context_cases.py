"""What the tests of context parallelism share: cases that cover every pair of choices, and one case run on one rank."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm import exchange
from armillary.comm.ledger import Ledger
from armillary.kernels.attention.call import attention
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.parallel.context.core import STRATEGIES, context_attention
from armillary.parallel.context.layout import PLACEMENTS, Layout, lay_out

PURE = tuple((name, name) for name in STRATEGIES)
MIXED = (("ring", "token_ring"), ("token_ring", "ulysses"), ("hybrid", "all_gather"), ("all_gather", "ring"))
CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": (*PURE, *MIXED),
    "placement": PLACEMENTS,
    "mask": (
        Mask(),
        Mask(causal=False),
        Mask(window=6),
        Mask(causal=False, window=5),
        Mask(window=4, sinks=2),
        Mask(window=4, block=2, sinks=2, stride=3, shift=1),
    ),
    "heads": ((4, 4), (6, 2), (3, 1), (5, 5), (2, 2)),
    "length": (37, 41, 3, 1),
    "documents": ("one", "packed", "short"),
}


@dataclass(frozen=True)
class Case:
    """One choice of everything."""

    strategy: tuple[str, str]
    placement: Any
    mask: Mask
    heads: tuple[int, int]
    length: int
    documents: str
    head_dim: int = 4

    def layout(self, num_ranks: int) -> Layout:
        """Two rows that differ."""
        shortest, longest = {"one": (self.length, self.length), "packed": (5, 17), "short": (1, 4)}[self.documents]
        rng = np.random.default_rng(self.length)
        positions, documents = np.zeros((2, 2, self.length), np.int64)
        for row in range(2):
            start = number = 0
            while start < self.length:
                stop = min(self.length, start + int(rng.integers(shortest, longest, endpoint=True)))
                positions[row, start:stop], documents[row, start:stop] = np.arange(stop - start), number
                start, number = stop, number + 1
        return lay_out(positions, documents, num_ranks, self.placement, mask=self.mask)

    def tensors(self, layout: Layout, dtype: torch.dtype) -> list[Tensor]:
        """Whole q, k, v, d_out and d_lse (batch, seq, heads), the same on every rank."""
        generator = torch.Generator().manual_seed(self.length)
        (batch, seq), (heads, kv_heads), dim = layout.positions.shape, self.heads, self.head_dim
        shapes = [(batch, seq, n, dim) for n in (heads, kv_heads, kv_heads, heads)] + [(batch, seq, heads)]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [tensor.to(dtype) for tensor in drawn[:4]] + drawn[4:]


def covering(seed: int, mixed: bool) -> list[Case]:
    """Cases in which every two values of two choices meet, chosen greedily from random ones; with `mixed`, also passes
    of unlike strategies."""
    choices = CHOICES if mixed else CHOICES | {"strategy": PURE}
    rng, names = random.Random(seed), list(choices)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x, y in itertools.product(range(len(choices[names[a]])), range(len(choices[names[b]])))
    }
    cases = []
    while pairs:
        a, x, b, y = rng.choice(sorted(pairs))
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(12):
            drawn = [rng.randrange(len(choices[name])) for name in names]
            drawn[a], drawn[b] = x, y
            best = max(best, (len(pairs & _pairs(drawn)), drawn))
        pairs -= _pairs(best[1])
        cases.append(Case(*(choices[name][value] for name, value in zip(names, best[1], strict=True))))
    return cases


def _pairs(drawn: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, drawn[a], b, drawn[b]) for a, b in itertools.combinations(range(len(drawn)), 2)}


def poison_receives() -> None:
    """Every receive buffer of this process is full of NaN until something arrives."""

    def full_of_nan(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    exchange.new_buffer = full_of_nan


def run_on_rank(case: Case, layout: Layout, whole: list[Tensor], ledger: Ledger) -> list[Tensor]:
    """This rank's out, lse (batch, seq, heads), dQ, dK and dV."""
    rank = dist.get_rank()
    *qkv, d_out, d_lse = [layout.take(tensor, rank) for tensor in whole]
    for tensor in qkv:
        tensor.requires_grad_()
    facts = {"group": dist.group.WORLD, "ledger": ledger}
    result = context_attention(*qkv, layout.shards(), case.mask, case.strategy, **facts)
    d_lse = d_lse.transpose(1, 2).to(result.lse.dtype)
    torch.autograd.backward(list(result), [d_out.to(result.out.dtype), d_lse])
    return [result.out.detach(), result.lse.detach().transpose(1, 2), *(tensor.grad for tensor in qkv)]


def run_alone(case: Case, layout: Layout, whole: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same of the whole batch, in one process."""
    qkv = [tensor.to(dtype).clone().requires_grad_() for tensor in whole[:3]]
    result = attention(*qkv, Places.of(layout.positions, layout.documents), mask=case.mask)
    d_lse = whole[4].transpose(1, 2).to(result.lse.dtype)
    torch.autograd.backward(list(result), [whole[3].to(dtype), d_lse])
    return [result.out.detach(), result.lse.detach().transpose(1, 2), *(tensor.grad for tensor in qkv)]
