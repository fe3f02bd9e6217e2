"""What a plan leaves to be measured, decided once when a run starts: the context strategy `auto`.

The decision goes into the run's config, so that a resumed run computes in the same order and gives the same bits.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from armillary.comm.collectives import all_reduce
from armillary.comm.link import Link, measure_link
from armillary.kernels.attention import forward
from armillary.kernels.mask import Mask
from armillary.kernels.places import Places
from armillary.kernels.tiles import Tile
from armillary.parallel.context_choice import Choice, Machine, Shape, choose
from armillary.parallel.mesh import Ranks
from armillary.train.build import COMPUTE
from armillary.train.config import RunConfig

LONGEST = 1024
"""Most tokens of the tile that is timed."""


def resolve(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, list[str]]:
    """The config with a strategy in place of `auto`, and a sentence for each that was chosen; the same on all ranks."""
    plan = config.plan
    names: list[Any] = [plan.context, plan.context_backward or plan.context]
    if plan.cp == 1 or "auto" not in names:
        return config, []
    shape = shape_of(config)
    machine = Machine(slowest_link(ranks), flops_of(config, shape, ranks))
    notes = []
    for index, name in enumerate(names):
        if name == "auto":
            choice: Choice = choose(shape, machine, backward=index == 1)
            names[index] = choice.strategy
            notes.append(choice.why)
    return replace(config, plan=replace(plan, context=names[0], context_backward=names[1])), notes


def shape_of(config: RunConfig) -> Shape:
    """The attention call of one micro-batch of a run; the last rank may hold a token less."""
    plan, model = config.plan, config.model
    rows = math.ceil(config.data.batch_size / (plan.dp * config.optim.micro_batches))
    tokens = math.ceil(config.data.sequence_length / plan.cp)
    itemsize = COMPUTE[config.optim.precision].itemsize
    return Shape(plan.cp, rows * tokens, model.num_heads, model.kv_heads, model.head_size, itemsize, rows=rows)


def slowest_link(ranks: Ranks) -> Link:
    """The link of the context group that has the worst one."""
    link = measure_link(ranks.context, ranks.ledger, ranks.device)
    return Link(
        _agreed(link.rate, ranks, dist.ReduceOp.MIN),
        _agreed(link.latency, ranks, dist.ReduceOp.MAX),
        _agreed(float(link.own_links), ranks, dist.ReduceOp.MIN) == 1,
    )


def flops_of(config: RunConfig, shape: Shape, ranks: Ranks) -> float:
    """Operations a second of the slowest rank, in a tile without a mask of this run's own size."""
    tokens, dtype = min(LONGEST, max(1, shape.tokens // shape.rows)), COMPUTE[config.optim.precision]
    places = Places.in_order(1, tokens)
    tile = Tile(places, places, Mask(causal=False), shape.head_dim**-0.5)
    q, k, v = (
        torch.zeros(1, tokens, heads, shape.head_dim, dtype=dtype, device=ranks.device)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    seconds = math.inf
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        forward(q, k, v, tile)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds = min(seconds, time.perf_counter() - began)
    return 4.0 * tokens**2 * shape.heads * shape.head_dim / _agreed(seconds, ranks, dist.ReduceOp.MAX)


def _agreed(value: float, ranks: Ranks, operation: dist.ReduceOp.RedOpType) -> float:
    number = torch.tensor(value, dtype=torch.float64, device=ranks.device)
    all_reduce(number, group=ranks.everyone, ledger=ranks.ledger, purpose="measurement", op=operation)
    return number.item()
