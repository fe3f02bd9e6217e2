"""One attention call of a context group as its strategies see it: who takes part, which heads, and single tiles of it.

Shapes are those of `kernels/attention/call.py`; a rank's tensors hold the tokens of its shard. A strategy is two
functions:

    forward(q, k, v, call) -> Partial                          out in q's dtype
    backward(d_out, q, k, v, lse, delta, call) -> Sums         float32 (float64 for float64)

with lse and delta of the whole rows. What travels is the inputs' dtype, but lse, delta and sums over ranks are float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm import exchange
from armillary.comm.exchange import Exchange, Receive, Send
from armillary.comm.ledger import Ledger
from armillary.kernels.attention import call as attention
from armillary.kernels.attention.call import Gradients, Partial
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.parallel.context.needs import Needs, needs_of


@dataclass(frozen=True)
class Heads:
    """Query heads `first .. stop` of a call in which `ratio` of them share a key head, and the key heads they use."""

    first: int
    stop: int
    ratio: int

    @property
    def num(self) -> int:
        return self.stop - self.first

    @property
    def kv_first(self) -> int:
        return self.first // self.ratio

    @property
    def kv_stop(self) -> int:
        return -(-self.stop // self.ratio) if self.stop > self.first else self.kv_first

    @property
    def num_kv(self) -> int:
        return self.kv_stop - self.kv_first

    def split(self, parts: int) -> tuple["Heads", ...]:
        """Query heads shared out in stretches whose lengths differ by one at most; key heads that two need are in
        both."""
        cuts = [self.first + self.num * part // parts for part in range(parts + 1)]
        return tuple(replace(self, first=a, stop=b) for a, b in pairwise(cuts))

    def of_keys(self, kv_first: int, kv_stop: int) -> "Heads":
        """Those that use the key heads `kv_first .. kv_stop`."""
        first = max(self.first, kv_first * self.ratio)
        return replace(self, first=first, stop=max(first, min(self.stop, kv_stop * self.ratio)))

    def within(self, whole: "Heads") -> tuple[slice, slice]:
        """Where these query heads and key heads stand in tensors that hold those of `whole`."""
        queries = slice(self.first - whole.first, self.stop - whole.first)
        return queries, slice(self.kv_first - whole.kv_first, self.kv_stop - whole.kv_first)

    def segments(self) -> list["Heads"]:
        """Stretches in which every key head serves equally many query heads, which is what a tile can compute: the
        whole key heads, and what is left of one before and after them."""
        low, high = -(-self.first // self.ratio) * self.ratio, self.stop // self.ratio * self.ratio
        cuts = sorted({self.first, self.stop, min(self.stop, low), max(self.first, high)})
        return [replace(self, first=a, stop=b) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Call:
    """What every strategy is told."""

    shards: tuple[Places, ...]
    """Places of the tokens of each rank that takes part."""
    rank: int
    """This rank's number among them."""
    peers: tuple[int, ...]
    """The number of each in `group`."""
    heads: Heads
    mask: Mask
    scale: float
    group: dist.ProcessGroup
    ledger: Ledger
    purpose: str
    """What the ledger counts the bytes for."""
    first_head: int = 0
    """Number, in the whole model, of the key head that this call counts as 0."""

    @property
    def size(self) -> int:
        return len(self.shards)

    @property
    def own(self) -> Places:
        return self.shards[self.rank]

    @property
    def needs(self) -> Needs:
        return needs_of(self.shards, self.mask)

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], like: Tensor, tag: int) -> Exchange:
        """Starts an exchange between ranks that are numbered as `shards` are."""
        return exchange.start(
            [replace(send, to=self.peers[send.to]) for send in sends],
            [replace(receive, source=self.peers[receive.source]) for receive in receives],
            group=self.group,
            ledger=self.ledger,
            purpose=self.purpose,
            device=like.device,
            tag=tag,
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sums(NamedTuple):
    """dQ, dK and dV as they add up, in the dtype of sums; shaped as q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def empty(cls, q: Tensor, k: Tensor, v: Tensor) -> "Sums":
        """Zeros to add to."""
        return cls(*(torch.zeros(t.shape, dtype=wide(t.dtype), device=t.device) for t in (q, k, v)))


def tile_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    queries: Places,
    keys: Places,
    heads: Heads,
    into: Partial | None = None,
    dtype: torch.dtype | None = None,
) -> Partial:
    """The result of the query and key heads `heads`, which are all that the tensors hold, over one tile: new, with
    `out` in `dtype`, or folded into `into`."""
    segments = heads.segments()
    if into is None and len(segments) == 1:
        return attention.forward(q, k, v, _tile(call, queries, keys, heads), dtype=dtype)
    result = into
    if result is None:
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=wide(q.dtype), device=q.device)
        result = Partial(torch.zeros(q.shape, dtype=lse.dtype, device=q.device), lse)
    for segment in segments:
        ours, theirs = segment.within(heads)
        tensors = q[:, :, ours], k[:, :, theirs], v[:, :, theirs]
        part = Partial(result.out[:, :, ours], result.lse[:, ours])
        attention.forward(*tensors, _tile(call, queries, keys, segment), part)
    return result if into is not None else Partial(result.out.to(dtype or q.dtype), result.lse)


def tile_backward(
    inputs: tuple[Tensor, ...], call: Call, queries: Places, keys: Places, heads: Heads, into: Sums
) -> None:
    """Adds one tile's gradients to `into`; `inputs` are d_out, q, k, v, lse and delta."""
    d_out, q, k, v, lse, delta = inputs
    for segment in heads.segments():
        ours, theirs = segment.within(heads)
        attention.backward(
            d_out[:, :, ours],
            q[:, :, ours],
            k[:, :, theirs],
            v[:, :, theirs],
            lse[:, ours],
            delta[:, ours],
            _tile(call, queries, keys, segment),
            Gradients(into.q[:, :, ours], into.k[:, :, theirs], into.v[:, :, theirs]),
        )


def own_backward(inputs: tuple[Tensor, ...], call: Call, total: Sums, *, last: bool) -> None:
    """Adds the gradients of a part of this rank's own tile: its later keys, first of all, while others' keys come; its
    earlier ones, `last`, while the last sums or results go home. Of one rank's tile there is one part."""
    d_out, q, k, v, lse, delta = inputs
    tokens, middle = np.arange(call.own.seq), call.own.seq // 2 if call.size > 1 else 0
    part = slice(0, middle) if last else slice(middle, None)
    places = call.own.picked((tokens < middle) == last)
    if places.seq:
        into = Sums(total.q, total.k[:, part], total.v[:, part])
        tile_backward((d_out, q, k[:, part], v[:, part], lse, delta), call, call.own, places, call.heads, into)


def _tile(call: Call, queries: Places, keys: Places, heads: Heads) -> Tile:
    return Tile(queries, keys, call.mask, call.scale, call.first_head + heads.kv_first)


def pick(tensor: Tensor, dim: int, held: np.ndarray, wanted: np.ndarray) -> Tensor:
    """What a tensor that holds the tokens `held` along `dim` has of the tokens `wanted`; both bool over an owner's
    tokens. A view where they are neighbours."""
    where = _where(held, wanted, tensor.device)
    if isinstance(where, slice):
        return tensor.narrow(dim, where.start, where.stop - where.start)
    return tensor.index_select(dim, where)


def put(tensor: Tensor, dim: int, held: np.ndarray, tokens: np.ndarray, part: Tensor) -> None:
    """Overwrites the tokens `tokens` of a tensor that holds the tokens `held` along `dim`."""
    where = _where(held, tokens, tensor.device)
    if isinstance(where, slice):
        tensor.narrow(dim, where.start, where.stop - where.start).copy_(part)
    else:
        tensor.index_copy_(dim, where, part.to(tensor.dtype))


def add(tensor: Tensor, dim: int, held: np.ndarray, tokens: np.ndarray, part: Tensor) -> None:
    """Adds to the tokens `tokens` of a tensor that holds the tokens `held` along `dim`."""
    where = _where(held, tokens, tensor.device)
    if isinstance(where, slice):
        tensor.narrow(dim, where.start, where.stop - where.start).add_(part)
    else:
        tensor.index_add_(dim, where, part.to(tensor.dtype))


def _where(held: np.ndarray, wanted: np.ndarray, device: torch.device) -> slice | Tensor:
    index = np.flatnonzero(wanted[held])
    if len(index) == 0:
        return slice(0, 0)
    if index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    on_host = torch.from_numpy(index)
    # From pinned memory, so that the host does not wait for the GPU.
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host
