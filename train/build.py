"""A model built for the ranks it will run on, with the same initial weights on any number of them."""

import torch

from armillary.parallel.apply import apply
from armillary.parallel.mesh import Ranks
from armillary.parallel.partition import place
from armillary.train.config import RunConfig
from armillary.train.model import Transformer, initialise

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def build_model(config: RunConfig, ranks: Ranks) -> Transformer:
    """A model with the plan applied and initial weights; each rank holds its shards only.

    Args:
        config: `optim.precision` is the compute dtype; weights are float32, or float64 where that is.
        ranks: the mesh of the plan.
    """
    compute = COMPUTE[config.optim.precision]
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to(torch.float64 if compute == torch.float64 else torch.float32)
    apply(model, config.plan, config.partition, ranks, compute)
    model.to_empty(device=ranks.device)
    initialise(model, config.model.seed, place)
    return model
