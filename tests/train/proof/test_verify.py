"""plan.verify: a plan is proved on the run's own ranks before it trains, and refused where it is wrong."""

import dataclasses
import os
from pathlib import Path

import planted_plans
import pytest
import torch
from tiny_run import make_trainer, write_run

from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Plan
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.data.config import DataConfig
from armillary.train.failure import RunStopped
from armillary.train.model.shape import ModelConfig, num_parameters
from armillary.train.optim.schedule import OptimConfig
from armillary.train.proof.matrix import config_of, covering_set, refused
from armillary.train.proof.verify import small, verify_plan

RUN = RunConfig(
    model=ModelConfig(dim=64, num_layers=5, num_heads=8, num_kv_heads=4, vocab_size=300),
    data=DataConfig(sequence_length=64, batch_size=8),
    optim=OptimConfig(micro_batches=2, precision="bfloat16"),
)


class Notes:
    """In the observer's place."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, object]]] = []

    def event(self, step: int, kind: str, message: str, **facts: object) -> None:
        self.events.append((kind, message, facts))


def verify(rank: int, plan: Plan, mistake: str) -> tuple[str, list[object], bool]:
    """What was said, the events, and whether random state and ledger were left alone."""
    if mistake:
        getattr(planted_plans, mistake)(rank)
    config = dataclasses.replace(RUN, plan=plan)
    ranks, notes, said = make_ranks(plan, torch.device("cpu")), Notes(), ""
    torch.manual_seed(5)
    before, rows = torch.get_rng_state(), ranks.ledger.by_purpose()
    try:
        verify_plan(config, ranks, notes, 3)
    except RunStopped as error:
        said = str(error)
    unmoved = torch.equal(before, torch.get_rng_state()) and ranks.ledger.by_purpose() == rows
    return said, notes.events, unmoved


PLANS = [
    Plan(dp=4, verify="first-step"),
    Plan(pp=2, tp=2, schedule="zbv", recompute="full", compile=True, verify="first-step"),
    Plan(cp=2, tp=2, context="ulysses", layers=(), verify="first-step"),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_honest_plan_is_verified_on_all_ranks(world, plan):
    for said, events, unmoved in world(verify, 4, plan, ""):
        assert said == ""
        ((kind, message, facts),) = events
        assert kind == "verified"
        assert message.startswith(f"verified: {plan} against one process")
        assert facts["error"] < 1e-9
        assert unmoved


@pytest.mark.parametrize(
    ("plan", "mistake"),
    [(PLANS[0], "averaged_gradients"), (PLANS[1], "replicas_not_summed"), (PLANS[2], "vocabulary_off_by_one")],
)
def test_a_wrong_plan_is_refused_on_all_ranks(world, plan, mistake):
    results = world(verify, 4, plan, mistake)
    assert len({said for said, _, _ in results}) == 1
    said = results[0][0]
    assert said.startswith(f"plan.verify: {plan} does not compute what one process computes: ")
    assert "is off by" in said
    assert results[0][1][0][0] == "unverified"


def test_without_the_key_nothing_is_done(world):
    assert world(verify, 1, Plan(), "") == [("", [], True)]


def test_the_small_run_is_of_the_same_kind_and_allowed():
    for case in covering_set():
        config = config_of(case)
        shrunk = small(config)
        assert not refused(shrunk), refused(shrunk)
        assert shrunk.plan.num_ranks == config.plan.num_ranks
        for section, keys in {
            "plan": ("schedule", "context", "recompute", "placement"),
            "model": ("tie_embeddings", "qk_norm", "qkv_bias"),
            "optim": ("kind",),
        }.items():
            for key in keys:
                assert getattr(getattr(shrunk, section), key) == getattr(getattr(config, section), key)
        assert shrunk.partition == config.partition
        assert shrunk.zero == config.zero
        grouping = [model.num_heads // model.kv_heads for model in (config.model, shrunk.model)]
        assert grouping[0] == grouping[1]


def test_what_it_costs_does_not_grow_with_the_model():
    large = ModelConfig(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, vocab_size=128_256)
    plan = Plan(pp=4, tp=8, cp=2, layers=(21, 20, 20, 19), verify="first-step")
    config = dataclasses.replace(
        RUN, model=large, plan=plan, data=DataConfig(sequence_length=8192), optim=OptimConfig(micro_batches=64)
    )
    shrunk = small(config)
    assert num_parameters(shrunk.model) < 250_000
    assert shrunk.plan.layers == (2, 2, 2, 2)
    assert shrunk.optim.micro_batches == 8
    assert (shrunk.model.num_heads, shrunk.model.num_kv_heads) == (64, 8)
    assert shrunk.data.sequence_length * shrunk.data.batch_size < 256


SETTINGS = """
[optim]
steps = 3
[plan]
dp = 2
verify = "first-step"
"""


def train(rank: int, folder: Path, mistake: str) -> str:
    os.chdir(folder)
    if mistake:
        getattr(planted_plans, mistake)(rank)
    trainer = make_trainer(rank, load_config("run.toml"), "a")
    try:
        trainer.run()
    except RunStopped as error:
        return str(error)
    finally:
        trainer.observer.close("finished")
    return ""


@pytest.mark.parametrize("mistake", ["", "averaged_gradients"])
def test_a_run_begins_with_it(world, tmp_path, mistake):
    write_run(tmp_path, SETTINGS)
    said = world(train, 2, tmp_path, mistake)
    rows = (tmp_path / "runs/a/metrics.jsonl").read_text()
    assert all(("does not compute" in sentence) == bool(mistake) for sentence in said)
    assert ("unverified" if mistake else "verified: dp=2 against one process") in rows
    assert ("train/loss" in rows) == (not mistake)
