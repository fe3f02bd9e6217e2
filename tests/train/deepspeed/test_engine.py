"""DeepSpeed's ZeRO computes what one process computes, and its checkpoints are everybody's."""

import os
from pathlib import Path

import pytest
import torch

from armillary.parallel.mesh import make_ranks
from armillary.train.build import build_engine
from armillary.train.checkpoint.load import read_full
from armillary.train.checkpoint.restore import load_state, shared_state
from armillary.train.checkpoint.save import Checkpointer
from armillary.train.checkpoint.store import CheckpointConfig, complete, read_manifest
from armillary.train.config import ConfigError, RunConfig, load_config
from armillary.train.data.dataset import micro_batches, prepare
from armillary.train.deepspeed.start import check_installed
from armillary.train.metrics import latest_per_step, read_metrics
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for number in range(15):
        (tmp_path / f"text/{number}.txt").write_text(f"{number}: " + "pack my box with jugs. " * (number % 4))
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(folder: Path, overrides: list[str]) -> RunConfig:
    os.chdir(folder)
    return load_config("run.toml", overrides)


def parity(rank: int, folder: Path, cases: list[list[str]]) -> list[dict]:
    """The errors of each case against one process: all on the same ranks, which import DeepSpeed once."""
    found = []
    for overrides in cases:
        config = settings(folder, overrides)
        dataset = prepare(config.data, lambda _: None)
        trace = trace_ranks(config, dataset, 3, make_ranks(config.plan, torch.device("cpu")))
        found.append(compare(trace, trace_one_process(config, dataset, 3)) if rank == 0 else {})
    return found


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


@pytest.mark.parametrize("num_ranks", sorted(PLANS))
def test_every_stage_computes_what_one_process_computes(world, folder, num_ranks):
    """With micro-batches, clipping, packed documents and grouped heads."""
    cases = [[DEEPSPEED, *overrides] for overrides in PLANS[num_ranks]]
    for overrides, found in zip(cases, world(parity, num_ranks, folder, cases)[0], strict=True):
        assert found["worst_error"] < 1e-9, (overrides, found)


def average(rank: int, folder: Path, cases: list[list[str]]) -> list[dict]:
    """A mistake: gradients averaged, as DeepSpeed does if left alone."""
    from armillary.train.deepspeed import start as deepspeed_start

    honest = deepspeed_start._settings
    deepspeed_start._settings = lambda *facts: honest(*facts) | {"gradient_allreduce_op": "mean"}
    return parity(rank, folder, cases)


def test_an_average_is_found(world, folder):
    (found,) = world(average, 2, folder, [[DEEPSPEED, "plan.dp=2", "zero.stage=2"]])[0]
    assert found["gradient_error"] == pytest.approx(0.5)


def bfloat16(rank: int, folder: Path, cases: list[list[str]]) -> list[dict]:
    """The errors of each case in bfloat16 against one process in float64."""
    found = []
    for overrides in cases:
        config = settings(folder, ["optim.precision=bfloat16", *overrides])
        dataset = prepare(config.data, lambda _: None)
        trace = trace_ranks(config, dataset, 3, make_ranks(config.plan, torch.device("cpu")))
        oracle = trace_one_process(settings(folder, []), dataset, 3) if rank == 0 else {}
        found.append(compare(trace, oracle) if rank == 0 else {})
    return found


def test_bfloat16_is_as_good_as_that_of_one_process(world, folder):
    (alone,) = world(bfloat16, 1, folder, [["plan.dp=1"]])[0]
    cases = [[DEEPSPEED, "plan.dp=2", f"zero.stage={stage}"] for stage in (1, 2, 3)]
    for found in world(bfloat16, 2, folder, cases)[0]:
        for error in ("loss_error", "gradient_error", "parameter_error"):
            assert 0 < found[error] < 2 * alone[error], (found, alone)


def skip_a_step(rank: int, folder: Path) -> list[bool]:
    """Whether a step that is not taken leaves nothing: for each stage, with and without one between two others."""
    same = []
    for stage in (1, 2, 3):
        config = settings(folder, [DEEPSPEED, "plan.dp=2", f"zero.stage={stage}"])
        dataset = prepare(config.data, lambda _: None)
        ranks = make_ranks(config.plan, torch.device("cpu"))
        results = []
        for cursors in ((0, 14), (0, -7, 14)):
            engine = build_engine(config, ranks)
            optimizers = engine.optimizers
            for cursor in cursors:
                engine.forward_backward(micro_batches(dataset, abs(cursor), 7, 2, rank, 2))
                engine.clip(engine.gradient_norm(), 0.5)
                if cursor >= 0:
                    optimizers.step(1.0)
                optimizers.zero_grad()
            results.append({name: parameter.detach() for name, parameter in engine.held.parameters().items()})
        same.append(all(torch.equal(results[0][name], results[1][name]) for name in results[0]))
    return same


def test_a_skipped_step_leaves_nothing(world, folder):
    assert world(skip_a_step, 2, folder) == [[True] * 3] * 2


def resave(rank: int, folder: Path, source: str, to: str, overrides: list[str]) -> None:
    """Loads a checkpoint under a plan and saves what came of it."""
    config = settings(folder, overrides)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    engine = build_engine(config, ranks)
    optimizers = engine.optimizers
    load_state(complete(Path(source))[0], engine.held, optimizers)
    said: list[str] = []
    saver = Checkpointer(Path(to), CheckpointConfig(), rank, ranks.num_ranks, "again", said.append)
    saver.save(6, shared_state(engine.held, optimizers), {}, {})
    saver.wait()
    assert not said, said


def train(rank: int, folder: Path, run: str, overrides: list[str], stop_at: int) -> None:
    """Trains from the newest checkpoint of a run, if there is one, and saves every second step."""
    config = settings(folder, overrides)
    ranks = make_ranks(config.plan, torch.device("cpu"))
    dataset = prepare(config.data, lambda _: None)
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


def test_a_run_goes_from_engine_to_engine(world, folder):
    """DeepSpeed on two ranks, FSDP on three, DeepSpeed on two again: the losses of one process."""
    world(train, 1, folder, "alone", [], 6)
    world(train, 2, folder, "moved", [DEEPSPEED, "zero.stage=2", "plan.dp=2"], 2)
    world(train, 3, folder, "moved", ["plan.dp=3"], 4)
    world(train, 2, folder, "moved", [DEEPSPEED, "plan.dp=2"], 6)
    runs = [latest_per_step(read_metrics(Path("runs", run, "metrics.jsonl"))) for run in ("alone", "moved")]
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        expected, found = ({row["step"]: row[key] for row in rows if key in row} for rows in runs)
        assert found == {step: pytest.approx(value, rel=1e-9) for step, value in expected.items()}, key
    assert sum("comm/bytes_weights" in row for row in runs[1]) == 6
    # And nothing is lost on the way from plan to plan: weights and moments, bit for bit.
    first = Path("runs/moved/checkpoints").absolute()
    world(resave, 3, folder, str(first), str(folder / "fsdp"), ["plan.dp=3"])
    world(resave, 2, folder, str(folder / "fsdp"), str(folder / "zero"), [DEEPSPEED, "zero.stage=1", "plan.dp=2"])
    saved = [complete(path)[0] for path in (first, folder / "fsdp", folder / "zero")]
    names = [name for name in read_manifest(saved[1]).tensors if not name.startswith("rank-")]
    assert len(names) > 60
    for name in names:
        tensors = [read_full(path, name) for path in saved]
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
    assert any(read_full(saved[2], name).abs().max() > 0 for name in names if "exp_avg_sq" in name)


def start_quietly(rank: int, folder: Path) -> tuple[str, bool]:
    """What is written to stdout when DeepSpeed starts and steps, and whether the environment is as it was."""
    import contextlib

    config = settings(folder, [DEEPSPEED, "plan.dp=1"])
    before = dict(os.environ)
    with open("said", "w") as file, contextlib.redirect_stdout(file):
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        parity(rank, folder, [[DEEPSPEED, "plan.dp=1"]])
        os.dup2(kept, 1)
    assert config.zero.stage == 3
    return Path("said").read_text(), dict(os.environ) == before


def test_deepspeed_starts_without_noise_and_puts_the_environment_back(world, folder):
    assert world(start_quietly, 1, folder) == [("", True)]


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
        load_config("run.toml", overrides)
    assert str(raised.value).startswith(f"{'--set' if key.split('.')[1] in str(overrides) else 'run.toml'}: {key}: ")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_it_is_missing_the_command_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'zero.engine: deepspeed is not installed; run pip install "armillary\[deep'):
        check_installed()
