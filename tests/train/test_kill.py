"""SIGKILLs at random moments of a run, each resumed: its last weights are the unbroken run's, bit for bit."""

import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import world as ranks
from tiny_run import make_trainer, write_run

from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.checkpoint.verify import verify
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.data.dataset import prepare
from armillary.train.observe.metrics_file import latest_per_step, read_metrics
from armillary.train.run_folder import create_run


@dataclass(frozen=True)
class Plan:
    """Under which plan a run of how many steps is killed how often."""

    overrides: tuple[str, ...]
    num_ranks: int
    kills: int
    steps: int

    def config(self) -> RunConfig:
        settings = [f"optim.steps={self.steps}", f"checkpoint.every={EVERY}"]
        return load_config("run.toml", [*self.overrides, *settings])


EVERY = 2
"""Steps from one checkpoint to the next."""
PLANS = {
    "dp=2": Plan(("plan.dp=2",), 2, 30, 200),
    "pp=2,tp=2": Plan(("plan.pp=2", "plan.tp=2", "optim.micro_batches=2"), 4, 6, 60),
}


def train(rank: int, folder: str, plan: str, run: str, attempt: str) -> None:
    os.chdir(folder)
    trainer = make_trainer(rank, PLANS[plan].config(), run, attempt)
    trainer.run()
    trainer.observer.close("finished")


def newest_step() -> int:
    found = complete(Path("runs/broken/checkpoints"))
    return int(found[0].name[-8:]) if found else 0


class Moments:
    """When to kill: at any point of the start, or of the steps and the save between two checkpoints, however fast the
    machine is just now."""

    def __init__(self) -> None:
        self.chance = random.Random(0)
        self.start_seconds = 0.0
        """What the latest start took, up to its first checkpoint."""

    def wait(self) -> None:
        if self.start_seconds and self.chance.random() < 0.3:
            time.sleep(self.chance.uniform(0, self.start_seconds))
            return
        began = last = time.monotonic()
        for number in range(self.chance.randint(1, 3)):
            wait_for_a_checkpoint()
            before, last = last, time.monotonic()
            if number == 0:
                self.start_seconds = last - began
        cycle = min(last - before, self.start_seconds / 4)
        time.sleep(self.chance.uniform(0, cycle))


def wait_for_a_checkpoint() -> None:
    known, deadline = newest_step(), time.monotonic() + 60
    while newest_step() == known and time.monotonic() < deadline:
        time.sleep(0.004)


def kill_at_random(moments: Moments, plan: str, attempt: str) -> None:
    """Starts the run, or goes on with it, and kills one rank or all of them after a while."""
    chance = moments.chance
    with tempfile.TemporaryDirectory() as folder:
        processes, _ = ranks.start(train, PLANS[plan].num_ranks, folder, os.getcwd(), plan, "broken", attempt)
        moments.wait()
        victims = processes if chance.random() < 0.5 else [chance.choice(processes)]
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.05))
        for process in processes:
            process.kill()
            process.join()


def losses(run: str) -> dict[int, float]:
    rows = latest_per_step(read_metrics(Path("runs", run, "metrics.jsonl")))
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_kills(tmp_path, monkeypatch, plan):
    case = PLANS[plan]
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    dataset = prepare(case.config().data)
    for name in ("whole", "broken"):
        create_run(case.config(), "run.toml", name, dataset.tokenizer)
    ranks.run(train, case.num_ranks, str(tmp_path), plan, "whole", "one")

    moments = Moments()
    reached = []
    for kill in range(case.kills):
        kill_at_random(moments, plan, f"attempt{kill}")
        reached.append(newest_step())
    # The kills hit a run that got on between them and was not yet done, or they prove nothing.
    assert 0 < reached[-1] < case.steps
    assert len(set(reached)) > case.kills // 3
    assert reached == sorted(reached)

    ranks.run(train, case.num_ranks, str(tmp_path), plan, "broken", "last")
    ends = [complete(Path("runs", name, "checkpoints"))[0] for name in ("whole", "broken")]
    assert [end.name for end in ends] == [f"step-{case.steps:08d}"] * 2
    assert [verify(end) for end in ends] == [[], []]
    assert read_manifest(ends[0]).weights == read_manifest(ends[1]).weights
    assert losses("broken") == losses("whole")
    # Nothing is left of the saves that were cut off.
    assert not [path for path in Path("runs/broken/checkpoints").iterdir() if ".tmp" in path.name]
