"""A plan applied to an ordinary model, in one order."""

import torch
from torch import nn

from armillary.parallel.context import ContextCore
from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import shard
from armillary.parallel.plan import Partition, Plan


def apply(model: nn.Module, plan: Plan, partition: Partition, ranks: Ranks, compute: torch.dtype) -> None:
    """Applies a plan to a model on the meta device, in place.

    The order, and why: (1) context: each block's attention core is replaced; it has no parameters. (2) partition, last
    of all, since it wraps what every other step has changed. It is left out where there is nothing to share and nothing
    to cast: there it would only copy. Afterwards the caller allocates (`model.to_empty`) and fills the weights
    (`parallel.partition.place`).
    """
    blocks: list[nn.Module] = list(model.blocks.values())  # type: ignore[operator]
    if plan.cp > 1:
        passes = (plan.context, plan.context_backward or plan.context)
        for block in blocks:
            attention: nn.Module = block.attention  # type: ignore[assignment]
            attention.core = ContextCore(
                passes, group=ranks.context, ledger=ranks.ledger, level=plan.context_level or None
            )
    if ranks.num_ranks > 1 or any(parameter.dtype != compute for parameter in model.parameters()):
        shard(model, blocks, partition, mesh=ranks.plane, compute=compute, ledger=ranks.ledger)
