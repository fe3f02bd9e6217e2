"""A whole run on real ranks: it learns, resumes bit for bit, crosses rank numbers, and recovers from bad steps."""

import argparse
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from tiny_run import make_trainer, write_run

from armillary.parallel.mesh import make_ranks
from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.config.run_config import load_config
from armillary.train.data.dataset import prepare
from armillary.train.failure import RunStopped
from armillary.train.observe.metrics_file import latest_per_step, read_metrics
from armillary.train.rank import check_same_everywhere, run_rank
from armillary.train.run_folder import RunFolder
from armillary.train.trainer import Progress, Trainer

SETTINGS = """
[optim]
steps = 8
[checkpoint]
every = 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a config and twenty short documents, as the working directory."""
    write_run(tmp_path, SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(rank: int, folder: Path, run: str, overrides: list[str], stop_at: int | None = None) -> None:
    """Runs to the end, or leaves without a word after `stop_at` steps, as a killed run does."""
    os.chdir(folder)
    config = load_config("run.toml", overrides)
    trainer = make_trainer(rank, config, run)
    if stop_at is None:
        trainer.run()
    else:
        trainer.begin()
        while trainer.progress.step < stop_at:
            trainer.train_step()
            trainer.save_if_due()
        trainer.checkpointer.wait()
        torch.distributed.barrier()
    trainer.observer.close("finished")


def weights(run: str) -> str:
    return read_manifest(complete(Path("runs", run, "checkpoints"))[0]).weights


def losses(run: str) -> dict[int, float]:
    rows = latest_per_step(read_metrics(Path("runs", run, "metrics.jsonl")))
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_learns_and_leaves_its_files(world, folder):
    world(train, 2, folder, "a", ["plan.dp=2", "optim.steps=20"])
    rows = latest_per_step(read_metrics(Path("runs/a/metrics.jsonl")))
    found = losses("a")
    assert sorted(found) == list(range(1, 21))
    assert found[1] == pytest.approx(math.log(257), rel=0.02)
    assert found[20] < 0.7 * found[1]
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert held_out[-1] < 0.8 * held_out[0]
    assert rows[-1]["comm/bytes_weights"] > 0
    assert [path.name for path in complete(Path("runs/a/checkpoints"))] == ["step-00000020", "step-00000018"]
    assert load_config("runs/a/config.toml") == load_config("run.toml", ["plan.dp=2", "optim.steps=20"])


def test_bfloat16_trains_like_float32(world, folder):
    for precision, num_ranks in (("float32", 1), ("bfloat16", 1), ("bfloat16", 3)):
        overrides = [f"optim.precision={precision}", f"plan.dp={num_ranks}", "checkpoint.every=0"]
        world(train, num_ranks, folder, f"{precision}-{num_ranks}", overrides)
    expected = losses("float32-1")
    for run in ("bfloat16-1", "bfloat16-3"):
        assert losses(run) != expected
        assert all(loss == pytest.approx(expected[step], rel=0.02) for step, loss in losses(run).items())


@pytest.mark.parametrize(
    ("num_ranks", "kind", "precision"),
    [(1, "adamw", "float32"), (3, "muon", "float32"), (1, "muon", "bfloat16"), (2, "adamw", "bfloat16")],
)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(world, folder, num_ranks, kind, precision):
    overrides = [f"plan.dp={num_ranks}", f"optim.kind={kind}", f"optim.precision={precision}"]
    world(train, num_ranks, folder, "whole", overrides)
    world(train, num_ranks, folder, "broken", overrides, 5)
    world(train, num_ranks, folder, "broken", overrides)
    assert weights("broken") == weights("whole")
    assert losses("broken") == losses("whole")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpoint_after_an_evaluation_holds_the_weights_themselves(world, folder, precision):
    """With weights kept whole from forward to backward, an evaluation has no backward that would let go of them."""
    overrides = ["plan.dp=2", "partition.weights=rank", f"optim.precision={precision}", "metrics.evaluate_every=1"]
    world(train, 2, folder, "whole", overrides)
    world(train, 2, folder, "broken", overrides, 5)
    saved = read_manifest(complete(Path("runs/broken/checkpoints"))[0]).tensors
    assert {len(stored.shards) for name, stored in saved.items() if name.startswith("model/blocks.0")} == {2}
    assert {stored.dtype for name, stored in saved.items() if name.startswith("model/")} == {"F32"}
    world(train, 2, folder, "broken", overrides)
    assert weights("broken") == weights("whole")


def test_a_step_moves_the_same_bytes_whether_or_not_it_follows_an_evaluation(world, folder):
    world(train, 2, folder, "a", ["plan.dp=2", "metrics.evaluate_every=3"])
    rows = [row for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/loss" in row]
    for purpose in ("weights", "gradients", "statistics"):
        assert len({row[f"comm/bytes_{purpose}"] for row in rows}) == 1
    assert not [key for row in rows for key in row if key == "comm/bytes_setup"]


def test_a_run_crosses_to_other_numbers_of_ranks(world, folder):
    world(train, 3, folder, "whole", ["plan.dp=3"])
    for stop_at, num_ranks in ((3, 3), (5, 1), (7, 2), (None, 4)):
        world(train, num_ranks, folder, "moved", [f"plan.dp={num_ranks}"], stop_at)
    expected, found = losses("whole"), losses("moved")
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)


def test_a_run_crosses_to_context_parallel_plans_and_back(world, folder):
    """Sharded by tokens, written, read again, sampled and evaluated: the same run as on one process."""
    sample = ["metrics.sample_prompt=the quick", "metrics.evaluate_every=3"]
    world(train, 1, folder, "whole", ["plan.dp=1", *sample])
    plans = (
        (3, 2, ["plan.cp=2", "plan.context=token_ring"]),
        (5, 4, ["plan.dp=2", "plan.cp=2", "plan.context=ulysses"]),
        (None, 3, ["plan.cp=3", "plan.placement=striped"]),
    )
    for stop_at, num_ranks, plan in plans:
        world(train, num_ranks, folder, "moved", [*plan, *sample], stop_at)
    expected, found = losses("whole"), losses("moved")
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)


def poisoned(rank: int, folder: Path, run: str, bad_steps: dict[int, int]) -> list[str]:
    """Trains with a loss that is not a number at some steps: how often each is still to be hit."""
    os.chdir(folder)
    config = load_config("run.toml", ["plan.dp=2", "guard.max_skips=1"])
    trainer = make_trainer(rank, config, run)
    honest = trainer.engine.forward_backward

    def forward_backward(batches):
        loss = honest(batches)
        if bad_steps.get(trainer.progress.step, 0) > 0:
            bad_steps[trainer.progress.step] -= 1
            for parameter in trainer.held.parameters().values():
                parameter.grad.to_local().fill_(math.nan)
        return loss

    trainer.engine.forward_backward = forward_backward
    before = []
    try:
        trainer.run()
    except RunStopped as stop:
        before.append(str(stop))
    trainer.observer.close("finished")
    assert all(torch.isfinite(parameter.to_local()).all() for parameter in trainer.held.parameters().values())
    return [*before, json.dumps([trainer.progress.step, trainer.progress.cursor])]


def events(run: str) -> list[tuple[str, int]]:
    rows = read_metrics(Path("runs", run, "metrics.jsonl"))
    kinds = ("skip", "rollback", "stop")
    return [(row["event"], row["step"]) for row in rows if row.get("event") in kinds]


def test_one_bad_step_is_skipped(world, folder):
    (end, _) = world(poisoned, 2, folder, "a", {3: 1})
    assert events("a") == [("skip", 3)]
    assert json.loads(end[-1]) == [8, 48]


def test_repeated_bad_steps_roll_back_and_leave_their_batches_out(world, folder):
    (end, _) = world(poisoned, 2, folder, "a", {3: 1, 4: 1})
    assert events("a") == [("skip", 3), ("rollback", 4)]
    # Two steps are done again, with batches that come after the bad ones.
    assert json.loads(end[-1]) == [8, 60]
    assert sorted(losses("a")) == list(range(1, 9))


def test_a_run_that_stays_bad_stops_and_says_so(world, folder):
    (end, _) = world(poisoned, 2, folder, "a", dict.fromkeys(range(3, 9), 99))
    assert [kind for kind, _ in events("a")] == ["skip", "rollback", "skip", "stop"]
    assert "roll-backs are used up" in end[0]


def overflowing(rank: int, folder: Path, bad_step: int) -> list[object]:
    """Trains until an update, made from a finite gradient, leaves weights that are not finite."""
    os.chdir(folder)
    config = load_config("run.toml", ["plan.dp=2", "guard.max_skips=1", "checkpoint.every=1", "checkpoint.keep=1"])
    trainer = make_trainer(rank, config, "a")
    honest = trainer.optimizers.step
    left = [1]

    def step(ratio):
        honest(ratio)
        if trainer.progress.step == bad_step and left and left.pop():
            next(iter(trainer.held.parameters().values())).data.to_local().fill_(math.inf)

    trainer.optimizers.__dict__["step"] = step
    said = ""
    try:
        trainer.run()
    except RunStopped as stop:
        said = str(stop)
    trainer.observer.close("finished")
    newest = complete(folder / "runs/a/checkpoints")[0].name
    return [said, newest, trainer.progress.step]


def test_weights_that_overflow_are_never_saved(world, folder):
    ((said, newest, step), _) = world(overflowing, 2, folder, 4)
    assert (said, newest, step) == ("", "step-00000008", 8)
    told = [row.get("event") for row in read_metrics(Path("runs/a/metrics.jsonl"))]
    told = [kind for kind in told if kind in ("unsound", "skip", "rollback")]
    assert told == ["unsound", "skip", "unsound", "rollback"]


def test_a_last_step_that_overflows_ends_the_run_as_failed(world, folder):
    ((said, newest, _), _) = world(overflowing, 2, folder, 8)
    assert "step 8 left weights that are not finite" in said
    assert newest == "step-00000007"


def test_without_a_checkpoint_there_is_no_way_back(world, folder):
    (end, _) = world(poisoned, 2, folder, "a", {1: 1, 2: 1})
    assert [kind for kind, _ in events("a")] == ["skip", "stop"]
    assert "no checkpoint to go back to" in end[0]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(world, folder):
    world(train, 2, folder, "whole", ["plan.dp=2"])
    world(train, 2, folder, "broken", ["plan.dp=2"], 6)
    flip_a_bit(Path("runs/broken/checkpoints/step-00000006/rank-00001.safetensors"))
    world(train, 2, folder, "broken", ["plan.dp=2"])
    told = {row["event"]: row for row in read_metrics(Path("runs/broken/metrics.jsonl")) if "event" in row}
    assert "step-00000006 is not sound and is passed over" in told["damaged"]["message"]
    assert "rank-00001.safetensors" in told["damaged"]["message"]
    assert told["resume"]["step"] == 4
    assert weights("broken") == weights("whole")


def test_a_run_without_a_sound_checkpoint_is_not_begun_again(world, folder):
    world(train, 1, folder, "a", [], 4)
    for path in complete(Path("runs/a/checkpoints")):
        (path / "manifest.json").write_text("x")
    (message,) = world(refused, 1, folder, [])
    assert "has 2 checkpoints, and none of them is sound" in message
    assert len(complete(Path("runs/a/checkpoints"))) == 2


def refused(rank: int, folder: Path, overrides: list[str]) -> str:
    os.chdir(folder)
    config = load_config("run.toml", overrides)
    try:
        make_trainer(rank, config, "a").run()
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_checkpoint_of_another_model_or_corpus_is_refused(world, folder):
    world(train, 1, folder, "a", [])
    (message,) = world(refused, 1, folder, ["model.num_layers=1"])
    assert "is not of this model" in message
    (message,) = world(refused, 1, folder, ["data.seed=5"])
    assert "other data than the config names" in message
    (message,) = world(refused, 1, folder, ["optim.steps=9"])
    assert message == "accepted"


def ranks_with_different_data(rank: int, folder: Path) -> str:
    os.chdir(folder)
    config = load_config("run.toml", ["plan.dp=2", f"data.seed={rank}"])
    ranks = make_ranks(config.plan, torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        check_same_everywhere(config, prepare(config.data), ranks)
    return str(caught.value)


def test_ranks_that_read_different_data_are_refused(world, folder):
    messages = world(ranks_with_different_data, 2, folder)
    assert all("different configs or different data" in message for message in messages)


def test_a_run_is_trained_by_one_process_at_a_time(folder):
    options = argparse.Namespace(
        config="run.toml", resume="", name="one", overrides=["optim.steps=2"], plan="", debug=False
    )
    run_rank(options)
    with FileLock("runs/one/.lock"):
        options.config, options.resume = "", "one"
        with pytest.raises(ValueError, match="another process is training this run"):
            run_rank(options)


def test_the_labels_without_a_loss_are_the_same_everywhere():
    from armillary.kernels import cross_entropy
    from armillary.train.data import packing

    assert packing.IGNORE == cross_entropy.IGNORE


def test_command_line_options_reach_the_trainer(folder, monkeypatch):
    """`run_rank` on one process: a new run, then a resume that needs nothing else."""
    options = {"overrides": ["optim.steps=2"], "plan": "", "debug": False}
    run_rank(argparse.Namespace(config="run.toml", resume="", name="one", **options))
    run_rank(argparse.Namespace(config="", resume="one", name="", **options | {"overrides": []}))
    assert complete(Path("runs/one/checkpoints"))[0].name == "step-00000002"
    told = Path("runs/one/metrics.jsonl").read_text()
    assert "finished" in told
    assert "there is nothing left to train, since optim.steps is 2" in told


def test_a_run_whose_folder_is_gone_stops(tmp_path):
    trainer = Trainer.__new__(Trainer)
    trainer.progress, trainer.folder = Progress(step=2), RunFolder(tmp_path / "gone")
    trainer.config = load_config("/dev/null", ["checkpoint.every=2", "optim.steps=8"])
    trainer.ranks, trainer.is_sound = SimpleNamespace(rank=0), lambda last: True
    with pytest.raises(RunStopped, match=r"gone/config\.toml is gone: was the run's folder moved or removed"):
        trainer.save_if_due()
