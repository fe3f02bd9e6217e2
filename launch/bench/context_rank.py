"""What each rank of `armillary bench context` runs: every strategy in turn, in three ways that are timed apart.

- together: as in a model;
- tiles: the same tiles in the same order, but nothing is sent, and what would be received is there at once;
- wire: the same transfers, started and waited for in the same order, but nothing is computed.

What `together` takes longer than `tiles` is exposed communication; `wire` is what there is to hide.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from armillary.comm.ledger import Ledger
from armillary.kernels.attention.call import CAUSAL, row_dots
from armillary.launch.bench.context_ways import Tiles, Watched, repeat
from armillary.launch.bench.on_ranks import serve
from armillary.parallel.context.bytes import bytes_sent
from armillary.parallel.context.call import Call, Heads
from armillary.parallel.context.core import smallest_divisor, strategy_of
from armillary.parallel.context.layout import lay_out
from armillary.parallel.mesh import joined_ranks
from armillary.parallel.plan import Plan
from armillary.train.resolve import slowest_link

PASSES = ("forward", "backward")
WAYS = ("together", "tiles", "wire")
DTYPE = torch.bfloat16
"""What training sends."""


@dataclass(frozen=True)
class Work:
    """What is measured: causal attention over one row of `tokens` a rank, in the default placement."""

    num_ranks: int
    tokens: int
    heads: tuple[tuple[int, int], ...]
    """Query heads and key heads of each case."""
    strategies: tuple[str, ...]
    repetitions: int
    head_dim: int = 64


class Case:
    """One number of heads: this rank's tensors, and a turn of each strategy."""

    def __init__(self, work: Work, heads: tuple[int, int], group: dist.ProcessGroup) -> None:
        self.work, self.heads, self.group = work, heads, group
        self.level = smallest_divisor(work.num_ranks)
        places = np.arange(work.tokens * work.num_ranks)[None]
        layout = lay_out(places, None, work.num_ranks, mask=CAUSAL)
        self.shards = layout.shards()
        random = torch.Generator().manual_seed(group.rank())
        count = self.shards[group.rank()].seq

        def tensor(num_heads: int) -> Tensor:
            return torch.randn(1, count, num_heads, work.head_dim, generator=random).to(DTYPE)

        self.q, self.k, self.v, self.d_out = (tensor(heads[i]) for i in (0, 1, 1, 0))
        self.events = {name: self._watch(name) for name in work.strategies}

    def call(self, purpose: str, kind: type[Call] = Call, ledger: Ledger | None = None) -> Any:
        """The call of a pass, with its exchanges as `kind` has them."""
        heads, kv_heads = self.heads
        rank, size = self.group.rank(), self.group.size()
        facts = (self.shards, rank, tuple(range(size)), Heads(0, heads, heads // kv_heads), CAUSAL)
        return kind(*facts, 1 / math.sqrt(self.work.head_dim), self.group, ledger or Ledger(), purpose)

    def turn(self, name: str, way: str) -> list[float]:
        """Seconds of this rank, forward and backward, each begun by all ranks together."""
        if way == "wire":
            return [self._timed(partial(repeat, events))[0] for events in self.events[name]]
        kind = Tiles if way == "tiles" else Call
        return self.both(name, [self.call(purpose, kind) for purpose in PASSES])

    def sent(self) -> dict[str, list[int]]:
        """Bytes that this rank sends, forward and backward, by the formula, which the ledger has been held against."""
        return {name: [self._formula(name, index) for index in range(2)] for name in self.work.strategies}

    def _watch(self, name: str) -> list[list[Any]]:
        ledger = Ledger()
        calls = [self.call(purpose, Watched, ledger) for purpose in PASSES]
        self.both(name, calls)
        for index, purpose in enumerate(PASSES):
            want = self._formula(name, index)
            assert ledger.bytes(purpose) == want, f"{name} {purpose}: {ledger.bytes(purpose)} bytes sent, not {want}"
        return [call.events for call in calls]

    def _formula(self, name: str, index: int) -> int:
        heads, kv_heads = self.heads
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": self.work.head_dim, "dtype": DTYPE}
        return bytes_sent(name, index == 1, self.shards, CAUSAL, level=self.level, **sizes)[self.group.rank()]

    def both(self, name: str, calls: list[Call]) -> list[float]:
        """Seconds of this rank's two passes, with a call for each."""
        way = strategy_of(name, self.work.num_ranks, self.level)
        q, k, v = self.q, self.k, self.v
        there, (out, lse) = self._timed(lambda: way.forward(q, k, v, calls[0]))
        delta = row_dots(out, self.d_out, lse)
        back, _ = self._timed(lambda: way.backward(self.d_out, q, k, v, lse, delta, calls[1]))
        return [there, back]

    def _timed(self, compute: Callable[[], Any]) -> tuple[float, Any]:
        dist.barrier(self.group)
        began = time.perf_counter()
        result = compute()
        return time.perf_counter() - began, result


def measure(work: Work, group: dist.ProcessGroup) -> dict[str, Any]:
    """This rank's figures: `seconds[case][strategy][way]`, one pair (forward, backward) a repetition, and `bytes`."""
    seconds: list[Any] = [{name: {way: [] for way in WAYS} for name in work.strategies} for _ in work.heads]
    sent = []
    for number, heads in enumerate(work.heads):
        case = Case(work, heads, group)
        sent.append(case.sent())
        for repetition in range(work.repetitions):
            first = repetition % len(work.strategies)
            for name in work.strategies[first:] + work.strategies[:first]:
                for way in WAYS:
                    seconds[number][name][way].append(case.turn(name, way))
            if group.rank() == 0:
                done = f"repetition {repetition + 1} of {work.repetitions}"
                print(f"{heads[0]} heads, {heads[1]} key heads: {done}", file=sys.stderr, flush=True)
    return {"seconds": seconds, "bytes": sent, "level": smallest_divisor(work.num_ranks)}


def torchs_own(work: Work, group: dist.ProcessGroup) -> list[str]:
    """Why torch's own context parallel does not run, for each case; empty where it does."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    found = []
    for heads, kv_heads in work.heads:
        q, k, v = (torch.randn(1, n, work.tokens, work.head_dim, dtype=DTYPE) for n in (heads, kv_heads, kv_heads))
        try:
            with context_parallel(DeviceMesh.from_group(group, "cpu"), buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            found.append("")
        except Exception as error:  # Whatever it is, it is the result.
            found.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return found


def figures(work: Work) -> dict[str, Any]:
    """Of this rank, with the link between the ranks, and why torch's own does not run."""
    with joined_ranks(Plan(cp=work.num_ranks), torch.device("cpu")) as ranks:
        link = asdict(slowest_link(ranks, ranks.context))
        return {**measure(work, ranks.context), "link": link, "torch": torchs_own(work, ranks.context)}


if __name__ == "__main__":
    serve(figures, Work)
