"""What a pipeline leaves to be measured: the times of its stages, a schedule for them, the layers of uneven ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Plan
from armillary.parallel.schedule.check import check
from armillary.train import resolve as resolving
from armillary.train.build import build_engine
from armillary.train.config.run_config import RunConfig
from armillary.train.data.config import DataConfig
from armillary.train.data.dataset import Batch
from armillary.train.model.shape import ModelConfig
from armillary.train.optim.schedule import OptimConfig
from armillary.train.resolve import resolve

MODEL = ModelConfig(dim=32, num_layers=8, num_heads=4, vocab_size=64)


def config(plan: Plan) -> RunConfig:
    data = DataConfig(sequence_length=16, batch_size=8)
    return RunConfig(model=MODEL, data=data, optim=OptimConfig(precision="float64", micro_batches=4), plan=plan)


def made_to_measure(rank: int) -> dict[str, object]:
    ranks = make_ranks(Plan(pp=2, dp=2), torch.device("cpu"))
    engine = build_engine(config(Plan(pp=2, dp=2, schedule="synthesised")), ranks)
    before = {name: tensor.detach().clone() for name, tensor in engine.held.parameters().items()}
    gradients = [parameter.grad for parameter in engine.held.parameters().values()]
    zeros = np.zeros((1, 16), dtype=np.int64)
    batches = [Batch(zeros + n, zeros, np.arange(16)[None], zeros) for n in range(4)]
    loss = engine.forward_backward(batches).item()
    same = all(torch.equal(before[name].to_local(), p.to_local()) for name, p in engine.held.parameters().items())
    schedule = engine.runner.schedule
    check(schedule)
    orders = {
        (stage, kind): [leaf.micro_batch for leaf in schedule.leaves() if (leaf.stage, leaf.kind) == (stage, kind)]
        for stage in (0, 1)
        for kind in ("F", "B", "W")
    }
    lines = str(schedule.lines())
    return {"loss": loss, "same": same, "gradients": gradients, "note": engine.note, "lines": lines, "orders": orders}


def test_a_schedule_made_to_measure(world):
    found = world(made_to_measure, 4)
    assert len({each["lines"] for each in found}) == 1, "all ranks run one schedule"
    assert all(each["same"] for each in found), "measuring leaves the weights as they are"
    assert all(gradient is None for each in found for gradient in each["gradients"]), "and no gradient behind"
    assert len({each["loss"] for each in found}) == 1
    assert "made to measure" in found[0]["note"]
    # Each stage adds up its micro-batches in their order, so that a resumed run, which measures anew, has equal bits.
    for order in found[0]["orders"].values():
        assert order == sorted(order)


def resolved_layers(rank: int, speeds: list[float]) -> tuple[tuple[int, ...], list[str]]:
    resolving.rank_speeds = lambda config, ranks: speeds
    ranks = make_ranks(Plan(pp=2), torch.device("cpu"))
    resolved, notes = resolve(config(Plan(pp=2, split="measured")), ranks)
    again, more = resolve(resolved, ranks)
    assert (again, more) == (resolved, []), "what was decided stays"
    return resolved.plan.layers, notes


@pytest.mark.parametrize(("speeds", "layers"), [([1.0, 1.0], (4, 4)), ([3.0, 1.0], (6, 2)), ([1.0, 3.0], (2, 6))])
def test_a_slow_rank_gets_fewer_layers(world, speeds, layers):
    for found, notes in world(resolved_layers, 2, speeds):
        assert found == layers
        assert len(notes) == 1


def measured_speeds(rank: int) -> list[float]:
    return resolving.rank_speeds(config(Plan(pp=2)), make_ranks(Plan(pp=2), torch.device("cpu")))


def test_speeds_are_measured_and_agreed(world):
    first, second = world(measured_speeds, 2)
    assert first == second
    assert all(speed > 1e6 for speed in first)


def test_a_split_that_is_named_is_not_measured(world):
    named = replace(config(Plan(pp=2, split="measured")), plan=Plan(pp=2, split="measured", layers=(1, 7)))
    assert resolving.choose_layers(named, None) == (named.plan, [])  # type: ignore[arg-type]
