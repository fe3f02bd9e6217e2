"""A plan applied to an ordinary model: its strategies one after the other, in one order.

A strategy is a function of a model and its site that changes the model in place, on the meta device, and does nothing
where the plan does not ask for it. To add one: write it here in a few lines, what it does in a room of its own, and put
it where it belongs in `STRATEGIES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from armillary.parallel.context.core import ContextCore
from armillary.parallel.cut import Cut
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import shard
from armillary.parallel.pipeline.cut_model import cut_to_stage
from armillary.parallel.plan import Partition, Plan
from armillary.parallel.tensor.cut_model import cut_to_rank
from armillary.parallel.tensor.cuts import first_kv_head, tensor_cuts

Stages = Sequence[tuple[int, int]]
"""Of each stage of a pipeline, in the model's order: the pipeline rank that holds it, and how many layers it has."""


@dataclass(frozen=True)
class Site:
    """What a strategy is told of the stage that it changes, and of where it will run."""

    plan: Plan
    partition: Partition | None
    """None leaves the state of the data plane to another engine."""
    ranks: Ranks
    compute: torch.dtype
    """Of forward and backward."""
    cuts: dict[str, Cut]
    """How tensor ranks divide each parameter of the whole model."""
    layers: range
    """Numbers of the stage's layers."""
    begins: bool
    ends: bool


def pipeline(model: Any, site: Site) -> None:
    """Keeps the stage's layers."""
    if site.plan.pp > 1:
        cut_to_stage(model, site.layers, site.begins, site.ends)


def tensor(model: Any, site: Site) -> None:
    """Cuts each parameter to this rank's part, and puts communication at the model's seams."""
    if site.plan.tp > 1:
        cut_to_rank(model, site.cuts, group=site.ranks.tensor, ledger=site.ranks.ledger)


def context(model: Any, site: Site) -> None:
    """Puts attention over the tokens of all ranks of the context group in the place of each attention's core."""
    plan, ranks = site.plan, site.ranks
    if plan.cp == 1:
        return
    for block in model.blocks.values():
        block.attention.core = ContextCore(
            (plan.context, plan.context_backward or plan.context),
            group=ranks.context,
            ledger=ranks.ledger,
            mask=block.attention.core.mask,
            level=plan.context_level or None,
            first_head=first_kv_head(site.cuts, ranks.tensor.rank(), block.attention.head_dim),
        )


def recompute(model: Any, site: Site) -> None:
    """Says to each block what it shall compute again for backward."""
    for block in model.blocks.values():
        block.recompute = site.plan.recompute


def compiled(model: Any, site: Site) -> None:
    """Compiles block by block."""
    if not site.plan.compile:
        return
    for block in model.blocks.values():
        # It works on tables of the host, which a compiler would take for constants: the graph breaks there.
        block.attention.core.forward = torch.compiler.disable(block.attention.core.forward)
        block.compile()


def partition(model: Any, site: Site) -> None:
    """Shards state over the data plane. Where there is nothing to share and nothing to cast it would only copy."""
    plane = site.ranks.plane
    if site.partition is None:
        return
    if plane.size() > 1 or any(parameter.dtype != site.compute for parameter in model.parameters()):
        shard(model, site.partition, mesh=plane, compute=site.compute, ledger=site.ranks.ledger)


STRATEGIES: tuple[Callable[[Any, Site], None], ...] = (
    pipeline,  # nothing after it works on layers of others
    tensor,  # says how many heads are here
    context,  # has no parameters, and takes whatever heads are here
    recompute,
    compiled,  # all that has been made of a block
    partition,  # wraps what every other step has changed
)


def apply(
    make: Callable[[], nn.Module],
    plan: Plan,
    partition: Partition | None,
    stages: Stages,
    ranks: Ranks,
    compute: torch.dtype,
) -> Held:
    """What this rank holds of a model under a plan, on the meta device.

    Afterwards the caller allocates (`to_empty`) and fills the weights (`Held.fill`).

    Args:
        make: a new whole Transformer (train/model/transformer.py) on the meta device, in the weights' dtype.
        partition: None leaves the state of the data plane to another engine.
        stages: of the pipeline; one if there is none.
        compute: dtype of forward and backward.
    """
    cuts = tensor_cuts(make(), plan.tp)
    edges = list(accumulate((layers for _, layers in stages), initial=0))
    held = []
    for number, (holder, _) in enumerate(stages):
        if holder != ranks.pipeline.rank():
            continue
        layers = range(edges[number], edges[number + 1])
        site = Site(plan, partition, ranks, compute, cuts, layers, number == 0, number == len(stages) - 1)
        model = make()
        for strategy in STRATEGIES:
            strategy(model, site)
        held.append(model)
    return Held(tuple(held), cuts, ranks, stages[-1][0])
