"""A plan applied to an ordinary model, in one order."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import nn

from armillary.parallel.context.core import ContextCore
from armillary.parallel.cut import Cut
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import shard
from armillary.parallel.pipeline.apply import keep_stage
from armillary.parallel.plan import Partition, Plan
from armillary.parallel.tensor.apply import apply_tensor, first_kv_head, tensor_cuts

Stages = Sequence[tuple[int, int]]
"""Of each stage of a pipeline, in the model's order: the pipeline rank that holds it, and how many layers it has."""


def apply(
    make: Callable[[], nn.Module],
    plan: Plan,
    partition: Partition | None,
    stages: Stages,
    ranks: Ranks,
    compute: torch.dtype,
) -> Held:
    """What this rank holds of a model under a plan, on the meta device.

    The order, and why: (1) pipeline: a stage keeps its layers, so that nothing after it works on others; (2) tensor:
    cuts the layers' parameters, which says how many heads are here; (3) context: replaces the attention's core, which
    has no parameters; (4) recompute: a block's own switch; (5) compile: block by block, all that has been made of it;
    (6) partition, last of all, since it wraps what every other step has changed. It is left out where there is nothing
    to share and nothing to cast: there it would only copy. Afterwards the caller allocates (`to_empty`) and fills the
    weights (`Held.fill`).

    Args:
        make: a new whole model on the meta device, in the weights' dtype.
        partition: None leaves it to another engine.
        stages: of the pipeline; one if there is none.
        compute: dtype of forward and backward.
    """
    whole = make()
    cuts = {name: Cut.whole(tuple(parameter.shape)) for name, parameter in whole.named_parameters()}
    if plan.tp > 1:
        cuts = tensor_cuts(whole, plan.tp)
    held = []
    edges = list(accumulate((layers for _, layers in stages), initial=0))
    for number, (holder, layers) in enumerate(stages):
        if holder == ranks.pipeline.rank():
            model = make()
            if len(stages) > 1:
                first = edges[number]
                keep_stage(model, range(first, first + layers), number == 0, number == len(stages) - 1)
            _apply_to_stage(model, cuts, plan, partition, ranks, compute)
            held.append(model)
    return Held(tuple(held), cuts, ranks, stages[-1][0])


def _apply_to_stage(
    model: nn.Module,
    cuts: dict[str, Cut],
    plan: Plan,
    partition: Partition | None,
    ranks: Ranks,
    compute: torch.dtype,
) -> None:
    blocks: list[nn.Module] = list(model.blocks.values())  # type: ignore[operator]
    if plan.tp > 1:
        apply_tensor(model, cuts, group=ranks.tensor, ledger=ranks.ledger)
    if plan.cp > 1:
        passes = (plan.context, plan.context_backward or plan.context)
        for block in blocks:
            attention: nn.Module = block.attention  # type: ignore[assignment]
            rank, head_dim = ranks.tensor.rank(), int(attention.head_dim)  # type: ignore[arg-type]
            head = first_kv_head(cuts, rank, head_dim) if plan.tp > 1 else 0
            attention.core = ContextCore(
                passes,
                group=ranks.context,
                ledger=ranks.ledger,
                mask=attention.core.mask,  # type: ignore[union-attr, arg-type]
                level=plan.context_level or None,
                first_head=head,
            )
    for block in blocks:
        block.recompute = plan.recompute  # type: ignore[assignment]
        if plan.compile:
            # It works on tables of the host, which a compiler would take for constants: the graph breaks there.
            core: nn.Module = block.attention.core  # type: ignore[assignment, union-attr]
            core.forward = torch.compiler.disable(core.forward)
            block.compile()
    if partition is None:
        return
    if ranks.plane.size() > 1 or any(parameter.dtype != compute for parameter in model.parameters()):
        shard(model, blocks, partition, mesh=ranks.plane, compute=compute, ledger=ranks.ledger)
