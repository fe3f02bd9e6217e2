"""What a plan leaves to be measured, decided once when a run starts: the context strategy `auto`, and which layers each
pipeline stage has where ranks are uneven.

The decision goes into the run's config, so that a resumed run computes in the same order and gives the same bits.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from armillary.comm.collectives import all_reduce
from armillary.comm.link import Link, measure_link, with_unit
from armillary.kernels.attention.call import forward
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.parallel.context.choice import Choice, Machine, Shape, choose
from armillary.parallel.mesh import Ranks
from armillary.parallel.plan import Plan
from armillary.train.config.run_config import RunConfig
from armillary.train.precision import COMPUTE
from armillary.train.stages import stages_of

LONGEST = 1024
"""Most tokens of the tile that is timed."""
PRODUCT_TOKENS, PRODUCT_SECONDS = 256, 0.25
"""Rows of the products that ranks' speeds are measured by, and for how long."""


def resolve(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, list[str]]:
    """The config with nothing left to be measured, and a sentence for each choice; the same on all ranks."""
    plan, strategies = choose_strategies(config, ranks)
    plan, layers = choose_layers(replace(config, plan=plan), ranks)
    return replace(config, plan=plan), strategies + layers


def choose_strategies(config: RunConfig, ranks: Ranks) -> tuple[Plan, list[str]]:
    """The plan with a context strategy in place of `auto`."""
    plan = config.plan
    names: list[Any] = [plan.context, plan.context_backward or plan.context]
    if plan.cp == 1 or "auto" not in names:
        return plan, []
    shape = shape_of(config)
    machine = Machine(slowest_link(ranks, ranks.context), flops_of(config, shape, ranks))
    notes = []
    for index, name in enumerate(names):
        if name == "auto":
            choice: Choice = choose(shape, machine, backward=index == 1)
            names[index] = choice.strategy
            notes.append(choice.why)
    return replace(plan, context=names[0], context_backward=names[1]), notes


def choose_layers(config: RunConfig, ranks: Ranks) -> tuple[Plan, list[str]]:
    """The plan with the layers of each stage, if they are to follow from the speeds of the pipeline's ranks."""
    plan = config.plan
    if plan.pp == 1 or plan.split != "measured" or plan.layers:
        return plan, []
    speeds = rank_speeds(config, ranks)
    stages = stages_of(plan, config.model, config.data.sequence_length, speeds)
    rates = ", ".join(with_unit(speed, "FLOP/s") for speed in speeds)
    layers = tuple(count for _, count in stages)
    return replace(plan, layers=layers), [f"pipeline: layers {list(layers)}, for ranks of {rates}"]


def rank_speeds(config: RunConfig, ranks: Ranks) -> list[float]:
    """Operations a second of each pipeline rank, in products like those of a layer; of its slowest member."""
    model, device = config.model, ranks.device
    x = torch.ones(PRODUCT_TOKENS, model.dim, dtype=COMPUTE[config.optim.precision], device=device)
    weight = torch.ones(model.hidden, model.dim, dtype=x.dtype, device=device)
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < PRODUCT_SECONDS or done < 3:
        x @ weight.t()
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    speeds = torch.full((config.plan.pp,), math.inf, dtype=torch.float64, device=device)
    speeds[ranks.pipeline.rank()] = 2.0 * done * x.shape[0] * weight.numel() / elapsed
    all_reduce(speeds, group=ranks.everyone, ledger=ranks.ledger, purpose="measurement", op=dist.ReduceOp.MIN)
    return speeds.tolist()


def shape_of(config: RunConfig) -> Shape:
    """The attention call of one micro-batch of a run; the last rank may hold a token less."""
    plan, model = config.plan, config.model
    rows = math.ceil(config.data.batch_size / (plan.dp * config.optim.micro_batches))
    tokens = math.ceil(config.data.sequence_length / plan.cp)
    itemsize = COMPUTE[config.optim.precision].itemsize
    # Of the heads that tensor ranks share out, those of one that has most.
    keys = math.ceil(model.kv_heads / plan.tp)
    heads = max(keys * (model.num_heads // model.kv_heads) // math.ceil(plan.tp / model.kv_heads), 1)
    return Shape(plan.cp, rows * tokens, heads, keys, model.head_size, itemsize, rows=rows)


def slowest_link(ranks: Ranks, group: dist.ProcessGroup) -> Link:
    """The link inside groups like `group`, of the one that has the worst."""
    link = measure_link(group, ranks.ledger, ranks.device)
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
