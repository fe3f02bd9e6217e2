"""A plan applied to an ordinary model, in one order."""

import torch
from torch import nn

from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import shard
from armillary.parallel.plan import Partition


def apply(model: nn.Module, partition: Partition, ranks: Ranks, compute: torch.dtype) -> None:
    """Applies the plan of `ranks` to a model on the meta device, in place.

    The order, and why: (1) partition, last of all, since it wraps what every other step has changed. It is left out
    where there is nothing to share and nothing to cast: there it would only copy. Afterwards the caller allocates
    (`model.to_empty`) and fills the weights (`parallel.partition.place`).
    """
    mesh = ranks.mesh["dp"]
    if mesh.size() > 1 or any(parameter.dtype != compute for parameter in model.parameters()):
        blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
        shard(model, blocks, partition, mesh=mesh, compute=compute, ledger=ranks.ledger)
