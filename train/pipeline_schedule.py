"""The schedule of a run's pipeline: a known one by its name, or one made to measure for this run's own stages."""

import json
import math
from collections.abc import Sequence

import numpy as np
import torch

from armillary.comm.link import with_unit
from armillary.parallel.held import Held
from armillary.parallel.pipeline.stage import HiddenShape
from armillary.parallel.pipeline.times import Times, measure_stages
from armillary.parallel.schedule.actions import Action, Schedule
from armillary.parallel.schedule.by_name import schedule_named
from armillary.parallel.schedule.simulator import Costs
from armillary.parallel.schedule.synthesis import Synthesis, synthesise
from armillary.train.config.run_config import RunConfig
from armillary.train.data.dataset import Batch
from armillary.train.resolve import slowest_link
from armillary.train.share import share


def schedule_of(
    config: RunConfig, held: Held, hidden: HiddenShape, compute: torch.dtype, stage_ranks: tuple[int, ...]
) -> tuple[Schedule, str]:
    """The schedule, the same on all ranks, and a sentence about one that was made to measure, or nothing.

    No schedule changes a bit of the result: each stage adds up its micro-batches in their order, whatever is between.
    """
    plan, num_micro_batches = config.plan, config.optim.micro_batches
    if plan.schedule != "synthesised":
        return schedule_named(plan.schedule, plan.pp, num_micro_batches, plan.per_rank), ""
    part = share(blank_batch(config), held.ranks, plan.placement).on(held.ranks.device)
    group, everyone, ledger = held.ranks.pipeline, held.ranks.everyone, held.ranks.ledger
    times = measure_stages(
        held.stages, stage_ranks, part, hidden, compute, group=group, everyone=everyone, ledger=ledger
    )
    hop = slowest_link(held.ranks, group).seconds(math.prod(hidden(part.places)) * compute.itemsize)
    forward, backward_input, backward_weight = (tuple(column) for column in zip(*times, strict=True))
    costs = Costs(forward, backward_input, backward_weight, hops=(hop,) * (len(times) - 1))
    limit = float(plan.in_flight or plan.pp) * plan.per_rank
    # One rank looks for it: the others would only take its cores.
    orders, note = "", ""
    if held.ranks.rank == 0:
        made = synthesise(stage_ranks, num_micro_batches, costs, [limit] * plan.pp, split=not plan.compile)
        orders, note = json.dumps(made.schedule.orders), _sentence(made, times, hop)
    orders, note = held.ranks.agree(orders), held.ranks.agree(note)
    actions = tuple(tuple(Action(*action) for action in order) for order in json.loads(orders))
    return Schedule("synthesised", num_micro_batches, stage_ranks, actions), note


def _sentence(made: Synthesis, times: Sequence[Times], hop: float) -> str:
    best = min(made.fitting, key=lambda name: made.stock[name].makespan, default="")
    known = "no known one fits"
    if best:
        known = f"the fastest known one that fits, {best}, takes {with_unit(made.best_stock, 's')}"
    stages = ", ".join(with_unit(sum(stage), "s") for stage in times)
    return (
        f"pipeline: a schedule made to measure, {with_unit(made.simulation.makespan, 's')} a step in the simulator; "
        f"{known}; at least {with_unit(made.bound, 's')} (stages take {stages} a micro-batch, a hop "
        f"{with_unit(hop, 's')})"
    )


def blank_batch(config: RunConfig) -> Batch:
    """A micro-batch of the run's size, one document a row."""
    rows = math.ceil(config.data.batch_size / (config.plan.dp * config.optim.micro_batches))
    shape = (rows, config.data.sequence_length)
    zeros = np.zeros(shape, dtype=np.int64)
    return Batch(zeros, zeros, np.broadcast_to(np.arange(shape[1]), shape), zeros)
