"""Which layers each pipeline stage of a run holds, and on which rank. Imports no torch, so a config can be refused."""

from collections.abc import Sequence

from armillary.parallel.pipeline.layers import LayerCosts, given_layers, split_layers
from armillary.parallel.plan import Plan
from armillary.parallel.schedule.actions import place_stages
from armillary.parallel.schedule.by_name import shape_of
from armillary.train.model.shape import ModelConfig, stage_costs


def stages_of(
    plan: Plan, model: ModelConfig, sequence_length: int, speeds: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Of each pipeline stage, in the model's order: its rank and its number of layers, as the plan names them or else
    so that the slowest rank has least to do.

    Args:
        speeds: of each pipeline rank, relative; equal if left out.

    Raises:
        ValueError: if there are more stages than layers, or the plan's own numbers do not add up.
    """
    if plan.pp == 1:
        return [(0, model.num_layers)]
    ranks = place_stages(plan.pp, plan.per_rank, shape_of(plan.schedule))
    if plan.layers:
        layers = given_layers(plan.layers, model.num_layers, len(ranks))
    else:
        layer, embedding, head = stage_costs(model, sequence_length)
        layers = split_layers(LayerCosts((layer,) * model.num_layers, embedding, head), ranks, speeds)
    return list(zip(ranks, layers, strict=True))


def refusals(plan: Plan, model: ModelConfig, sequence_length: int) -> list[tuple[str, str]]:
    """What the plan asks for that the model's shape does not give: pairs of key and sentence."""
    found = []
    if plan.tp > model.num_heads:
        found.append(
            ("plan.tp", f"is {plan.tp}; tensor ranks share out heads, and model.num_heads is {model.num_heads}")
        )
    elif plan.tp > model.hidden:
        found.append(("plan.tp", f"is {plan.tp}, but the feed-forward has {model.hidden} channels (model.ffn_dim)"))
    try:
        stages_of(plan, model, sequence_length)
    except ValueError as error:
        found.append(("plan.pp", str(error)))
    return found
