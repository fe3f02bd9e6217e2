"""Where DeepSpeed's ZeRO has the elements of each parameter, as pure numbers, and the way from there to rows and back.

DeepSpeed cuts flat buffers, so its pieces are no boxes of a tensor. But a piece is one stretch of the parameter's
elements in order, and so is a shard of whole rows, as FSDP2 and our checkpoints have it: going from the one to the
other is one all_to_all in which each element travels at most once.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.collectives import all_to_all
from armillary.comm.ledger import Ledger

Span = tuple[int, int]
"""First element of a flat parameter, and the one after the last; empty where they are equal."""


@dataclass(frozen=True)
class Pieces:
    """What each rank has of one parameter."""

    spans: tuple[Span, ...]
    """Elements of the parameter, by rank."""
    positions: tuple[int, ...]
    """Where the piece begins in the rank's own flat buffer, by rank."""


def pieces_of_one_flat(sizes: Sequence[int], offsets: Sequence[int], part: int, num_ranks: int) -> list[Pieces]:
    """ZeRO-1 and ZeRO-2: all parameters of a group in one flat buffer, of which each rank has `part` elements.

    Args:
        sizes, offsets: elements of each parameter, and where it begins in the buffer.
    """
    found = []
    for size, offset in zip(sizes, offsets, strict=True):
        edges = [min(max(rank * part - offset, 0), size) for rank in range(num_ranks + 1)]
        spans = tuple(itertools.pairwise(edges))
        found.append(Pieces(spans, tuple(max(offset - rank * part, 0) for rank in range(num_ranks))))
    return found


def pieces_of_each(sizes: Sequence[int], num_ranks: int) -> list[Pieces]:
    """ZeRO-3: each parameter cut into equal parts, the last one padded; a rank has its parts in a row."""
    parts = [math.ceil(size / num_ranks) for size in sizes]
    found = []
    for size, part, position in zip(sizes, parts, itertools.accumulate(parts, initial=0), strict=False):
        edges = [min(rank * part, size) for rank in range(num_ranks + 1)]
        found.append(Pieces(tuple(itertools.pairwise(edges)), (position,) * num_ranks))
    return found


def overlap(a: Span, b: Span) -> Span:
    """The elements in both; an empty span where there are none."""
    first = max(a[0], b[0])
    return first, max(first, min(a[1], b[1]))


def redistribute(
    sources: Sequence[Sequence[Span]],
    targets: Sequence[Sequence[Span]],
    outgoing: Sequence[Tensor],
    incoming: Sequence[Tensor],
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
    purpose: str,
) -> None:
    """Brings the elements of flat tensors from those who have them to those who want them, bit for bit.

    Args:
        sources, targets: for each tensor, which elements each rank has, and which it is to get; the same on all ranks.
            Together the sources have each element once.
        outgoing, incoming: this rank's elements, flat, and the flat tensors to fill; all of one dtype.
        group: the ranks.
        ledger, purpose: where the bytes are counted.
    """
    ranks, me = range(group.size()), group.rank()
    sends = [
        [_cut(source, mine[me], wanted[rank]) for mine, wanted, source in zip(sources, targets, outgoing, strict=True)]
        for rank in ranks
    ]
    receives = [
        [
            _cut(target, wanted[me], theirs[rank])
            for theirs, wanted, target in zip(sources, targets, incoming, strict=True)
        ]
        for rank in ranks
    ]
    sizes_in, sizes_out = ([sum(part.numel() for part in parts) for parts in each] for each in (sends, receives))
    flat = torch.cat([part for parts in sends for part in parts])
    arrived = flat.new_empty(sum(sizes_out))
    all_to_all(arrived, flat, sizes_out, sizes_in, group=group, ledger=ledger, purpose=purpose)
    parts = [part for parts in receives for part in parts]
    for part, data in zip(parts, arrived.split([part.numel() for part in parts]), strict=True):
        part.copy_(data)


def _cut(tensor: Tensor, span: Span, other: Span) -> Tensor:
    """The view of a flat tensor, which has the elements of `span`, that has those of `other` too."""
    first, last = overlap(span, other)
    return tensor[first - span[0] : last - span[0]]
