"""Which rank of a context group holds which tokens of a batch. Pure functions of host arrays; no processes.

Tensors are rectangular, so a rank holds equally many tokens of every row; nothing is padded. How many is decided by the
row's length, the number of ranks and their speeds alone; which ones, row by row. Nothing needs to divide: counts differ
by one token, and a rank may hold none. A rank's tokens are kept in the order of the row, with their own positions.

Placements:
- contiguous: a stretch of the row; for masks that look a window back, where only neighbours exchange;
- zigzag: the row in two stretches a rank, one from the front and its mirror image; equal work for one causal document;
- striped: token t on rank t mod P; equal work for anything, at the price of tiles that are all triangles;
- document_zigzag: each document as zigzag does the row; the documents' remainders go round the ranks as stripes would;
- chunks: chunks of 256 to 512 tokens, dealt out by their attention work, the heaviest first, to the least loaded rank.

Sources: zigzag and striped, Brandon et al. 2023 (Striped Attention) and Zhu 2024 (ring-flash-attention); chunks, Graham
1969 (longest processing time first), with a limit of tokens a rank as in MagiAttention's dispatch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places

Placement = Literal["contiguous", "zigzag", "striped", "document_zigzag", "chunks"]
PLACEMENTS: tuple[Placement, ...] = ("contiguous", "zigzag", "striped", "document_zigzag", "chunks")
CHUNK = (256, 512)
"""Fewest and most tokens of a chunk; shorter only where a rank would get fewer than `FEW` chunks."""
MANY, FEW = 16, 4
"""Chunks a rank and row that are aimed at, and the fewest that balance."""


class ShardPlaces(Places):
    """One rank's places, and with them those of every rank of its context group: what a model is given as `places`."""

    def __init__(self, shards: Sequence[Places], rank: int) -> None:
        own = shards[rank]
        super().__init__(own.batch, own.seq, own.runs)
        self.shards, self.rank = tuple(shards), rank
        self._derived = own._derived


@dataclass(frozen=True)
class Layout:
    """Who holds what: every token of every row is on exactly one rank."""

    positions: np.ndarray
    """Position of each token in its document, int64 (batch, seq)."""
    documents: np.ndarray
    """Document of each token, int64 (batch, seq)."""
    tokens: tuple[np.ndarray, ...]
    """For each rank the tokens of each row that it holds, ascending: int64 (batch, number of the rank's tokens)."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens a row of each rank."""
        return tuple(index.shape[1] for index in self.tokens)

    def shards(self) -> tuple[Places, ...]:
        """The places of each rank's tokens, the same objects at every call: they keep what is derived from them."""
        return self._shards

    @cached_property
    def _shards(self) -> tuple[Places, ...]:
        return tuple(
            Places.of(np.take_along_axis(self.positions, index, 1), np.take_along_axis(self.documents, index, 1))
            for index in self.tokens
        )

    def places(self, rank: int) -> ShardPlaces:
        """The places of one rank's tokens, which know those of the others."""
        return ShardPlaces(self.shards(), rank)

    def take(self, tensor: Any, rank: int) -> Any:
        """A rank's share of a tensor or array (batch, seq, ...): (batch, the rank's tokens, ...)."""
        rows = np.arange(len(self.positions))[:, None]
        if isinstance(tensor, Tensor):
            index = torch.from_numpy(self.tokens[rank]).to(tensor.device)
            return tensor[torch.from_numpy(rows).to(tensor.device), index]
        return tensor[rows, self.tokens[rank]]


def lay_out(
    positions: np.ndarray,
    documents: np.ndarray | None,
    num_ranks: int,
    placement: Placement | None = None,
    *,
    mask: Mask | None = None,
    speeds: Sequence[float] | None = None,
) -> Layout:
    """Shares out a batch.

    Args:
        positions: of each token in its document, integers (batch, seq).
        documents: number of each token's document, (batch, seq); None for one document a row.
        num_ranks: any number, also more than tokens.
        placement: None for `default_placement`.
        mask: what attention sees, which is what a token costs; None for causal.
        speeds: of the ranks, relative: tokens and work are shared out in proportion (chunks and contiguous only).

    Raises:
        ValueError: for an unknown placement, speeds that are not one positive number a rank, or speeds with a placement
            that cannot heed them.
    """
    mask = Mask() if mask is None else mask
    positions = np.asarray(positions, dtype=np.int64)
    documents = np.zeros_like(positions) if documents is None else np.asarray(documents, dtype=np.int64)
    placement = default_placement(mask, documents) if placement is None else placement
    if placement not in PLACEMENTS:
        raise ValueError(f"layout: there is no placement {placement!r}; there are {', '.join(PLACEMENTS)}")
    if speeds is not None and placement not in ("chunks", "contiguous"):
        raise ValueError(f"layout: {placement} shares out evenly; with speeds the placement is chunks or contiguous")
    if speeds is not None and (len(speeds) != num_ranks or min(speeds) <= 0):
        raise ValueError(f"layout: {len(speeds)} speeds for {num_ranks} ranks; each rank has one positive speed")
    batch, seq = positions.shape
    if placement == "chunks":
        owner = _chunks(keys_seen(mask, positions, documents), num_ranks, speeds)
    elif placement == "contiguous":
        owner = np.broadcast_to(np.repeat(np.arange(num_ranks), quotas(seq, num_ranks, speeds)), (batch, seq))
    elif placement == "striped":
        owner = np.broadcast_to(np.arange(seq) % num_ranks, (batch, seq))
    else:
        names = documents if placement == "document_zigzag" else np.zeros_like(documents)
        owner = np.stack([_zigzag(row, num_ranks) for row in names]) if batch else np.zeros((0, seq), np.int64)
    return Layout(positions, documents, _tokens_of_each(owner, num_ranks))


def default_placement(mask: Mask, documents: np.ndarray) -> Placement:
    """By what the mask makes a token cost: contiguous where only a window is seen, zigzag where every row is one
    document, chunks where documents are packed."""
    if mask.window and not mask.sinks and not mask.stride:
        return "contiguous"
    documents = np.asarray(documents)
    return "zigzag" if bool((documents == documents[:, :1]).all()) else "chunks"


def quotas(seq: int, num_ranks: int, speeds: Sequence[float] | None = None) -> np.ndarray:
    """Tokens of a row for each rank, in proportion to its speed; the remainder goes to the largest fractions, then to
    the first ranks: int64 (num_ranks,)."""
    shares = np.ones(num_ranks) if speeds is None else np.asarray(speeds, dtype=np.float64)
    exact = seq * shares / shares.sum()
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: seq - int(whole.sum())]] += 1
    return whole


def keys_seen(mask: Mask, positions: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """How many keys each token's query sees, which is its attention work: int64 (batch, seq).

    Taken from the first and last position of its document in the row; strided blocks count on the average.
    """
    first, last = np.zeros_like(positions), np.zeros_like(positions)
    for row in range(len(positions)):
        _, name = np.unique(documents[row], return_inverse=True)
        ends = np.full((2, int(name.max(initial=-1)) + 1), np.iinfo(np.int64).max)
        ends[1] = -1
        np.minimum.at(ends[0], name, positions[row])
        np.maximum.at(ends[1], name, positions[row])
        first[row], last[row] = ends[0][name], ends[1][name]
    last = positions if mask.causal else last
    if not mask.window:
        return last - first + 1
    block = positions // mask.block
    begin = np.maximum(first, (block - mask.reach + 1) * mask.block)
    last = np.minimum(last, (block + mask.reach) * mask.block - 1)
    sinks = np.clip(np.minimum(mask.sinks, begin) - first, 0, None)
    far = (begin - first - sinks) // mask.stride if mask.stride else 0
    return last - begin + 1 + sinks + far


def _tokens_of_each(owner: np.ndarray, num_ranks: int) -> tuple[np.ndarray, ...]:
    """Tokens by rank, given the rank of each; rows have equally many of each."""
    # Sixteen bits are sorted in linear time.
    order = np.argsort(owner.astype(np.uint16 if num_ranks < 1 << 16 else np.int64), axis=1, kind="stable")
    counts = np.bincount(owner[0], minlength=num_ranks) if len(owner) else np.zeros(num_ranks, np.int64)
    return tuple(np.split(order, np.cumsum(counts)[:-1], axis=1))


def _zigzag(names: np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank of each token of a row, each stretch of equal names going once up and once down the ranks.

    A rank gets as many tokens of a stretch as stripes over the whole row would give it, so that its share of a row
    does not depend on the documents.
    """
    owner = np.empty(len(names), dtype=np.int64)
    starts = np.flatnonzero(np.diff(names, prepend=np.nan)) if len(names) else np.zeros(0, np.int64)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(names)], strict=False):
        share = np.bincount(np.arange(start, stop) % num_ranks, minlength=num_ranks)
        # The ranks in turn, from the one whose stripe comes first; odd shares are halved up and down by turns.
        turn = (start + np.arange(num_ranks)) % num_ranks
        front = (share[turn] + np.arange(num_ranks) % 2) // 2
        back = (share[turn] - front)[::-1]
        owner[start:stop] = np.repeat(np.concatenate([turn, turn[::-1]]), np.concatenate([front, back]))
    return owner


def _chunks(work: np.ndarray, num_ranks: int, speeds: Sequence[float] | None) -> np.ndarray:
    """The rank of each token: a row's chunks, the heaviest first, each to the rank with the least work for its speed
    among those that still have room in this row. Loads go on from row to row."""
    batch, seq = work.shape
    speed = np.ones(num_ranks) if speeds is None else np.asarray(speeds, dtype=np.float64)
    size = min(max(seq // (MANY * num_ranks), CHUNK[0]), CHUNK[1])
    size = max(1, min(size, seq // (FEW * num_ranks)))
    owner = np.empty((batch, seq), dtype=np.int64)
    loads = np.zeros(num_ranks)
    for row in range(batch):
        total = np.concatenate([[0], np.cumsum(work[row])])
        starts = np.arange(0, seq, size)
        stops = np.minimum(starts + size, seq)
        order = np.argsort(-(total[stops] - total[starts]), kind="stable")
        room = quotas(seq, num_ranks, speeds)
        heap = [(loads[rank] / speed[rank], rank) for rank in range(num_ranks) if room[rank]]
        heapq.heapify(heap)
        for start, stop in zip(starts[order].tolist(), stops[order].tolist(), strict=True):
            while start < stop:
                _, rank = heapq.heappop(heap)
                # What does not fit goes on to the next rank.
                end = min(stop, start + int(room[rank]))
                owner[row, start:end] = rank
                loads[rank] += total[end] - total[start]
                room[rank] -= end - start
                start = end
                if room[rank]:
                    heapq.heappush(heap, (loads[rank] / speed[rank], rank))
    return owner
