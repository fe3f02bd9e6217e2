"""A plan applied to an ordinary model, in one order."""

from collections.abc import Callable

import torch
from torch import nn

from armillary.parallel.context import ContextCore
from armillary.parallel.cut import Cut
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import shard
from armillary.parallel.pipeline_cut import keep_stage
from armillary.parallel.plan import Partition, Plan
from armillary.parallel.schedule import Schedule
from armillary.parallel.tensor import apply_tensor, first_kv_head, tensor_cuts


def apply(
    make: Callable[[], nn.Module], plan: Plan, partition: Partition, ranks: Ranks, compute: torch.dtype, order: Pipe
) -> Held:
    """What this rank holds of a model under a plan, on the meta device.

    The order, and why: (1) pipeline: a stage keeps its layers, and nothing after it works on others; (2) tensor: cuts
    the layers' parameters, and so says how many heads are here; (3) context: replaces the attention's core, which has
    no parameters; (4) recompute: a block's own switch; (5) compile: block by block, of what all that has made;
    (6) partition, last of all, since it wraps what every other step has changed. It is left out where there is nothing
    to share and nothing to cast: there it would only copy. Afterwards the caller allocates (`to_empty`) and fills the
    weights (`Held.fill`).

    Args:
        make: a new whole model on the meta device, in the weights' dtype.
        layers: of each stage of the pipeline, its layers.
        schedule: says which stages are this rank's.
    """
