"""Every plan computes what one process computes; and a parity that is broken on purpose is found broken."""

import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_run import write_run

from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Plan
from armillary.train.config.run_config import load_config
from armillary.train.data.dataset import prepare
from armillary.train.proof.parity import compare, trace_one_process, trace_ranks

SETTINGS = """
[model]
dim = 36
num_heads = 6
num_kv_heads = 2
vocab_size = 260
[data]
sequence_length = 33
batch_size = 7
[optim]
precision = "float64"
steps = 9
clip_norm = 0.5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_run(tmp_path, SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def errors(rank: int, folder: Path, overrides: list[str], break_it: str = "") -> dict[str, object]:
    os.chdir(folder)
    config = load_config("run.toml", overrides)
    dataset = prepare(config.data)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    if break_it:
        sabotage(break_it, rank)
    trace = trace_ranks(config, dataset, 3, ranks)
    return compare(trace, trace_one_process(config, dataset, 3)) if rank == 0 else {}


def sabotage(what: str, rank: int) -> None:
    """Mistakes that real frameworks have made."""
    from armillary.comm import collectives
    from armillary.parallel import serial
    from armillary.train.proof import parity
    from armillary.train.share import Share

    honest = collectives.reduce_scatter

    def drop_a_rank(output, input, **facts):
        return honest(output, input * (rank != 1), **facts)

    def mean_of_means(share):
        return 2 * max(1, int((share.labels != -100).sum()))

    honest_batches = parity.micro_batches
    if what == "a rank dropped":
        collectives.reduce_scatter = drop_a_rank
    elif what == "a wrong count":
        Share.num_labels = property(mean_of_means)
    elif what == "micro-batches not synchronised":
        serial.Serial._sync_gradients = lambda self, sync: self.model.set_requires_gradient_sync(not sync)
    elif what == "a document's border":
        parity.micro_batches = lambda *arguments: [
            type(batch)(batch.tokens, batch.labels, batch.positions, batch.documents * 0)
            for batch in honest_batches(*arguments)
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["plan.dp=1"],
        ["plan.dp=2", "model.qk_norm=true", "model.qkv_bias=true"],
        ["plan.dp=3", "optim.micro_batches=2", "model.tie_embeddings=false"],
        ["plan.dp=4", "optim.kind=muon", "partition.weights=rank", "optim.micro_batches=2"],
        ["plan.dp=3", "optim.kind=muon", "optim.micro_batches=3", "model.tie_embeddings=false"],
        ["plan.dp=5", "data.batch_size=3", "optim.micro_batches=2"],
        ["plan.dp=8", "optim.clip_norm=0"],
        ["plan.dp=2", "plan.cp=2", "plan.context=bidirectional_ring", "optim.micro_batches=2"],
        ["plan.cp=3", "plan.context=token_ring", "optim.kind=muon", "model.tie_embeddings=false"],
        ["plan.cp=3", "plan.context=all_gather", "plan.placement=striped", "partition.weights=rank"],
        ["plan.dp=2", "plan.cp=3", "plan.context=ulysses", "optim.kind=muon", "optim.micro_batches=3"],
        ["plan.cp=4", "plan.context=hybrid", "plan.placement=zigzag"],
        ["plan.cp=4", "plan.context=ring", "plan.context_backward=token_ring", "plan.placement=document_zigzag"],
        ["plan.dp=2", "plan.cp=4", "plan.placement=contiguous", "model.qk_norm=true"],
        ["plan.cp=5", "plan.context=token_ring", "data.sequence_length=4", "data.batch_size=3"],
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_a_plan_computes_what_one_process_computes(world, folder, overrides):
    num_ranks = load_config("run.toml", overrides).plan.num_ranks
    found = world(errors, num_ranks, folder, overrides)[0]
    assert found["worst_error"] < 1e-9, found
    assert found["worst_error"] == max(found["loss_error"], found["gradient_error"], found["parameter_error"])


def every_strategy(rank: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """The worst error of each, all on the same ranks."""
    return {
        name: errors(rank, folder, [*overrides, f"plan.context={name}"]).get("worst_error", 0.0)
        for name in get_args(get_type_hints(Plan)["context"])
    }


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_every_context_strategy_computes_what_one_process_computes(world, folder, cp):
    """With packed documents, grouped heads and FSDP."""
    found = world(every_strategy, cp, folder, [f"plan.cp={cp}"])[0]
    assert len(found) >= 6
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize(
    "mistake", ["a rank dropped", "a wrong count", "micro-batches not synchronised", "a document's border"]
)
def test_a_mistake_is_found(world, folder, mistake):
    found = world(errors, 2, folder, ["plan.dp=2", "optim.micro_batches=2"], mistake)[0]
    assert found["worst_error"] > 1e-6, found


def test_compare_does_not_lose_a_nan_or_a_missing_tensor():
    good = {"loss/0": torch.ones(1), "gradient/0/w": torch.ones(3), "parameter/w": torch.ones(3)}
    assert compare(good, good)["worst_error"] == 0
    bad = good | {"gradient/0/w": torch.tensor([1.0, float("nan"), 1.0])}
    assert compare(bad, good)["worst_error"] == float("inf")
    assert compare(bad, good)["worst_name"] == "gradient/0/w"
    for other in ({"loss/0": torch.ones(1)}, good | {"parameter/v": torch.ones(3)}):
        with pytest.raises(AssertionError, match="different tensors"):
            compare(other, good)
    off = good | {"parameter/w": torch.tensor([1.0, 1.0, 1.5])}
    assert compare(off, good)["parameter_error"] == 0.5
