"""DeepSpeed's ZeRO computes what one process computes, and its checkpoints are everybody's."""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from armillary.parallel.mesh import make_ranks
from armillary.train.build import build_engine
from armillary.train.checkpoint.load import read_full
from armillary.train.checkpoint.restore import load_state, shared_state
from armillary.train.checkpoint.save import Checkpointer
from armillary.train.checkpoint.store import CheckpointConfig, complete, read_manifest
from armillary.train.config.run_config import ConfigError, RunConfig, load_config
from armillary.train.data.dataset import micro_batches, prepare
from armillary.train.deepspeed import start
from armillary.train.observe.metrics_file import latest_per_step, read_metrics
from armillary.train.proof.parity import compare, trace_one_process, trace_ranks
from armillary.train.run_folder import create_run, open_run
from armillary.train.trainer import Trainer

CONFIG = """
[model]
dim = 36
num_layers = 2
num_heads = 6
num_kv_heads = 2
vocab_size = 260
[data]
sequence_length = 33
batch_size = 7
tokenizer = "bytes"
held_out = 0.2
sources = [{path = "text"}]
cache = "cache"
[optim]
precision = "float64"
learning_rate = 1e-2
steps = 6
clip_norm = 0.5
micro_batches = 2
[checkpoint]
every = 2
[metrics]
wandb = "off"
evaluate_sequences = 4
"""
DEEPSPEED = "zero.engine=deepspeed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed")
    (path / "text").mkdir()
    for number in range(15):
        (path / f"text/{number}.txt").write_text(f"{number}: " + "pack my box with jugs. " * (number % 4))
    (path / "run.toml").write_text(CONFIG)
    return path


def settings(folder: Path, overrides: list[str]) -> RunConfig:
    os.chdir(folder)
    return load_config("run.toml", overrides)


def parity(rank: int, folder: Path, overrides: list[str]) -> dict:
    """The errors against one process in float64; on rank 0."""
    config = settings(folder, overrides)
    dataset = prepare(config.data)
    trace = trace_ranks(config, dataset, 3, make_ranks(config.plan, torch.device("cpu")))
    oracle = replace(config, optim=replace(config.optim, precision="float64"))
    return compare(trace, trace_one_process(oracle, dataset, 3)) if rank == 0 else {}


def averaged(rank: int, folder: Path, overrides: list[str]) -> dict:
    """`parity` with a mistake: gradients averaged, as DeepSpeed does if left alone."""
    honest = start._settings
    start._settings = lambda *facts: honest(*facts) | {"gradient_allreduce_op": "mean"}
    try:
        return parity(rank, folder, overrides)
    finally:
        start._settings = honest


def rounding(rank: int, folder: Path) -> dict:
    """The errors of one process in bfloat16 against one in float64."""
    config = settings(folder, [])
    dataset = prepare(config.data)
    narrow = replace(config, optim=replace(config.optim, precision="bfloat16"))
    traces = (trace_one_process(each, dataset, 3) for each in (narrow, config))
    return compare(*traces) if rank == 0 else {}


def skip_a_step(rank: int, folder: Path, stage: int) -> bool:
    """Whether a step that is not taken leaves nothing: with and without one between two others."""
    config = settings(folder, [DEEPSPEED, "plan.dp=2", f"zero.stage={stage}"])
    dataset = prepare(config.data)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    results = []
    for cursors in ((0, 14), (0, -7, 14)):
        engine = build_engine(config, ranks)
        for cursor in cursors:
            engine.forward_backward(micro_batches(dataset, abs(cursor), 7, 2, rank, 2))
            engine.clip(engine.gradient_norm(), 0.5)
            if cursor >= 0:
                engine.optimizers.step(1.0)
            engine.optimizers.zero_grad()
        results.append({name: parameter.detach() for name, parameter in engine.held.parameters().items()})
    return all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def noise(rank: int, folder: Path) -> tuple[str, bool]:
    """What is written to stdout when DeepSpeed starts and steps, and whether the environment is as it was."""
    before, said = dict(os.environ), folder / f"said-{rank}"
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        parity(rank, folder, [DEEPSPEED, "plan.dp=2"])
        os.dup2(kept, 1)
    return said.read_text(), dict(os.environ) == before


PLANS = {
    2: [
        ["plan.dp=2", "zero.stage=1"],
        ["plan.dp=2", "zero.stage=2", "optim.micro_batches=3", "plan.recompute=selective"],
        ["plan.dp=2", "zero.stage=3", "model.tie_embeddings=false"],
        ["plan.cp=2", "zero.stage=2", "plan.context=ring", "model.tie_embeddings=false"],
        ["plan.tp=2", "zero.stage=3"],
    ],
    3: [["plan.dp=3", "zero.stage=1"], ["plan.dp=3", "zero.stage=3", "plan.recompute=full"]],
    4: [["plan.dp=2", "plan.tp=2", "zero.stage=2"], ["plan.dp=2", "plan.cp=2", "zero.stage=3"]],
}


def parities(rank: int, folder: Path, plans: list[list[str]]) -> list[dict]:
    return [parity(rank, folder, [DEEPSPEED, *overrides]) for overrides in plans]


def everything_on_two(rank: int, folder: Path) -> dict:
    """Of all that two ranks can show, the first rank's results."""
    return {
        "noise": noise(rank, folder),  # first, since DeepSpeed is not imported yet
        "parities": parities(rank, folder, PLANS[2]),
        "averaged": averaged(rank, folder, [DEEPSPEED, "plan.dp=2", "zero.stage=2"]),
        "rounding": rounding(rank, folder),
        "bfloat16": parities(
            rank, folder, [["plan.dp=2", f"zero.stage={stage}", "optim.precision=bfloat16"] for stage in (1, 2, 3)]
        ),
        "skipped": [skip_a_step(rank, folder, stage) for stage in (1, 2, 3)],
    }


@pytest.fixture(scope="module")
def two(world, folder):
    return world(everything_on_two, 2, folder)


@pytest.mark.parametrize("num_ranks", sorted(PLANS))
def test_every_stage_computes_what_one_process_computes(world, folder, two, num_ranks):
    """With micro-batches, clipping, packed documents and grouped heads."""
    plans = PLANS[num_ranks]
    errors = two[0]["parities"] if num_ranks == 2 else world(parities, num_ranks, folder, plans)[0]
    for overrides, found in zip(plans, errors, strict=True):
        assert found["worst_error"] < 1e-9, (overrides, found)


def test_an_average_is_found(two):
    assert two[0]["averaged"]["gradient_error"] == pytest.approx(0.5)


def test_bfloat16_is_as_good_as_that_of_one_process(two):
    for found in two[0]["bfloat16"]:
        for error in ("loss_error", "gradient_error", "parameter_error"):
            assert 0 < found[error] < 2 * two[0]["rounding"][error], found


def test_a_skipped_step_leaves_nothing(two):
    assert [found["skipped"] for found in two] == [[True] * 3] * 2


def test_deepspeed_starts_without_noise_and_puts_the_environment_back(two):
    assert [found["noise"] for found in two] == [("", True)] * 2


def resave(rank: int, folder: Path, source: Path, to: Path, overrides: list[str]) -> None:
    """Loads the newest checkpoint of a folder under a plan and saves what came of it."""
    config = settings(folder, overrides)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    engine = build_engine(config, ranks)
    load_state(complete(source)[0], engine.held, engine.optimizers)
    said: list[str] = []
    saver = Checkpointer(to, CheckpointConfig(), rank, ranks.num_ranks, "again", said.append)
    saver.save(2, shared_state(engine.held, engine.optimizers), {}, {})
    saver.wait()
    assert not said, said


def train(rank: int, folder: Path, run: str, overrides: list[str], stop_at: int) -> None:
    """Trains from the newest checkpoint of a run, if there is one, and saves every second step."""
    config = settings(folder, overrides)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    dataset = prepare(config.data)
    if rank == 0 and not Path("runs", run).exists():
        create_run(config, "run.toml", run, dataset.tokenizer)
    torch.distributed.barrier()
    trainer = Trainer(config, ranks, open_run(run), dataset, f"until{stop_at}")
    trainer.begin()
    while trainer.progress.step < stop_at:
        trainer.train_step()
        trainer.evaluate_if_due()
        trainer.save_if_due()
    trainer.checkpointer.wait()
    trainer.observer.close("finished")


def resave_and_train(rank: int, folder: Path, source: Path, to: Path, overrides: list[list[str]], stop_at: int) -> None:
    resave(rank, folder, source, to, overrides[0])
    train(rank, folder, "moved", overrides[1], stop_at)


def test_a_run_goes_from_engine_to_engine(world, folder):
    """DeepSpeed on two ranks, FSDP on three, DeepSpeed on two again: the losses of one process."""
    runs, zero, fsdp, again = folder / "runs", folder / "zero", folder / "fsdp", folder / "again"
    world(train, 1, folder, "alone", [], 6)
    world(train, 2, folder, "moved", [DEEPSPEED, "zero.stage=2", "plan.dp=2"], 2)
    shutil.copytree(runs / "moved/checkpoints", zero)
    world(resave_and_train, 3, folder, zero, fsdp, [["plan.dp=3"]] * 2, 4)
    stage_1 = [DEEPSPEED, "zero.stage=1", "plan.dp=2"]
    world(resave_and_train, 2, folder, fsdp, again, [stage_1, [DEEPSPEED, "plan.dp=2"]], 6)
    rows = [latest_per_step(read_metrics(runs / run / "metrics.jsonl")) for run in ("alone", "moved")]
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        expected, found = ({row["step"]: row[key] for row in each if key in row} for each in rows)
        assert len(expected) >= 2
        assert found == {step: pytest.approx(value, rel=1e-9) for step, value in expected.items()}, key
    assert sum("comm/bytes_weights" in row for row in rows[1]) == 6
    # And nothing is lost on the way from plan to plan: weights and moments, bit for bit.
    saved = [complete(path)[0] for path in (zero, fsdp, again)]
    names = [name for name in read_manifest(saved[1]).tensors if not name.startswith("rank-")]
    assert len(names) > 60
    for name in names:
        tensors = [read_full(path, name) for path in saved]
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
    assert any(read_full(saved[2], name).abs().max() > 0 for name in names if "exp_avg_sq" in name)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([DEEPSPEED, "plan.pp=2"], "zero.engine", "cannot run the stages of plan.pp = 2"),
        ([DEEPSPEED, "optim.kind=muon"], "zero.engine", "Muon needs matrices"),
        ([DEEPSPEED, "partition.weights=rank"], "zero.engine", "not by [partition]"),
        (["zero.stage=2"], "zero.stage", 'partition.weights = "rank"'),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(folder, overrides, key, words):
    with pytest.raises(ConfigError) as raised:
        settings(folder, overrides)
    assert str(raised.value).startswith(f"{'--set' if key.split('.')[1] in str(overrides) else 'run.toml'}: {key}: ")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_it_is_missing_the_command_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'zero.engine: deepspeed is not installed; run pip install "armillary\[deep'):
        start.check_installed()
