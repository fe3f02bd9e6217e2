"""A model built for the ranks it will run on, with the same initial weights on any number of them."""

import torch

from armillary.kernels.attention.places import Places
from armillary.parallel.apply import Stages, apply
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks
from armillary.parallel.pipeline.runner import Pipeline
from armillary.parallel.runner import Runner
from armillary.parallel.serial import Serial
from armillary.parallel.tensor.cuts import hidden_shape
from armillary.train.config.run_config import RunConfig
from armillary.train.deepspeed.engine import shard_with_deepspeed
from armillary.train.engine import Engine
from armillary.train.model.transformer import Transformer, initial
from armillary.train.optim.optimizers import build_optimizers
from armillary.train.pipeline_schedule import schedule_of
from armillary.train.precision import COMPUTE, weights_dtype
from armillary.train.stages import stages_of


def build_engine(config: RunConfig, ranks: Ranks) -> Engine:
    """A model with the plan applied and initial weights, ready to run; each rank holds its shards only.

    Args:
        config: `optim.precision` is the compute dtype; weights are float32, or float64 where that is. Nothing in its
            plan is left to be measured.
        ranks: the mesh of the plan.
    """
    compute, plan = COMPUTE[config.optim.precision], config.plan
    partition = config.partition if config.zero.engine == "fsdp" else None
    stages = stages_of(plan, config.model, config.data.sequence_length)

    def make() -> Transformer:
        with torch.device("meta"):
            model = Transformer(config.model)
        return model.to(weights_dtype(config.optim.precision))

    held = apply(make, plan, partition, stages, ranks, compute)
    for stage in held.stages:
        stage.to_empty(device=ranks.device)
    if partition is None:
        engine: Engine = shard_with_deepspeed(held, config.zero.stage, config.optim, plan.placement)
        fill(engine.held, config)
        return engine
    fill(held, config)
    runner, note = (Serial(held.stages[0]), "") if plan.pp == 1 else _pipeline(config, held, stages, compute)
    return Engine(held, build_optimizers(held, config.optim), runner, plan.placement, note)


def _pipeline(config: RunConfig, held: Held, stages: Stages, compute: torch.dtype) -> tuple[Runner, str]:
    """The pipeline, and a sentence about a schedule that was made to measure."""
    plan, ranks = config.plan, held.ranks

    def hidden(places: Places) -> tuple[int, ...]:
        return hidden_shape((places.batch, places.seq), config.model.dim, plan.tp)

    schedule, note = schedule_of(config, held, hidden, compute, tuple(rank for rank, _ in stages))
    pipeline = Pipeline(
        held.stages,
        schedule,
        group=ranks.pipeline,
        ledger=ranks.ledger,
        device=ranks.device,
        dtype=compute,
        hidden=hidden,
        # Two threads in one step: only where no stage speaks to other ranks while it computes, and where kernels run
        # beside each other; two threads of one CPU rank only share its cores.
        overlap=ranks.device.type == "cuda" and plan.tp == plan.cp == 1,
    )
    return pipeline, note


def fill(held: Held, config: RunConfig) -> None:
    """Gives every parameter its initial values, from the model's seed."""
    for name, parameter in held.parameters().items():
        full = initial(name, held.cuts[name].shape, config.model.num_layers, config.model.seed)
        held.fill(name, parameter, full)
    held.update_twins()
