"""Where a training step's time and memory go, on one rank or several; `docs/step.md` reads the tables.

python -m armillary.launch.bench.step configs/demo.toml --plan dp=1
torchrun --nproc-per-node 4 -m armillary.launch.bench.step configs/demo.toml
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from armillary.launch.bench.alive import Alive
from armillary.launch.rows import print_table
from armillary.parallel.mesh import joined_ranks
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.data.dataset import prepare
from armillary.train.failure import guarded, leave
from armillary.train.run_folder import RunFolder
from armillary.train.trainer import Trainer

WARM_UP = 2


@dataclass
class Part:
    """What one part of a step took, over all steps."""

    calls: int = 0
    process: float = 0.0
    """Processor seconds of the whole process: gloo's threads work beside the main one."""
    main: float = 0.0
    """Processor seconds of the main thread."""
    wall: float = 0.0


def parts_of(trainer: Trainer) -> dict[str, tuple[Any, str]]:
    """Object and method of each part of a step; an indented one lies inside one above it."""
    engine = trainer.engine
    return {
        "whole step": (trainer, "train_step"),
        "data": (trainer, "take_batches"),
        "forward and backward": (engine, "forward_backward"),
        "  of the micro-batches": (engine.runner, "forward_backward"),
        "  replicas and twins": (type(engine.held), "complete_gradients"),
        "gradient norm": (engine, "gradient_norm"),
        "clip": (engine, "clip"),
        "optimizers": (type(engine.optimizers), "step"),
        **{f"  {type(each).__name__}": (each, "step") for each in engine.optimizers.optimizers},
        "zero gradients": (type(engine.optimizers), "zero_grad"),
        "metrics and status line": (trainer.observer, "step"),
    }


@contextmanager
def timed(places: dict[str, tuple[Any, str]]) -> Iterator[dict[str, Part]]:
    """Adds up what these methods take while the context lasts."""
    found: dict[str, Part] = {}
    with_names = [(name, *place, getattr(*place)) for name, place in places.items()]
    for name, owner, method, real in with_names:
        setattr(owner, method, _timed(real, found.setdefault(name, Part())))
    try:
        yield found
    finally:
        for _, owner, method, real in with_names:
            setattr(owner, method, real)


def _timed(function: Callable[..., Any], part: Part) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        before = time.process_time(), time.thread_time(), time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            part.calls += 1
            part.process += time.process_time() - before[0]
            part.main += time.thread_time() - before[1]
            part.wall += time.perf_counter() - before[2]

    return call


def watched_step(trainer: Trainer) -> Alive:
    """A step's memory and copies."""
    state = list(trainer.optimizers.state_tensors().values())
    with Alive({"weights": list(trainer.held.parameters().values()), "optimizer state": state}) as mode:
        trainer.train_step()
    return mode


def measure(config: RunConfig, folder: Path, steps: int) -> list[list[list[str]]]:
    """Tables, each with its header, of the rank that runs this: times, memory, copies, collectives."""
    torch.set_num_threads(1)
    config = replace(config, metrics=replace(config.metrics, wandb="off"))
    dataset = prepare(config.data)
    with joined_ranks(config.plan) as ranks:
        trainer = Trainer(config, ranks, RunFolder(folder), dataset, "bench")
        for _ in range(WARM_UP):
            trainer.train_step()
        with timed(parts_of(trainer)) as parts:
            for _ in range(steps):
                trainer.train_step()
        seen = watched_step(trainer)
        moved = list(ranks.ledger.entries.items())
        trainer.observer.close("finished")
    return [
        [["part", "processor, ms", "main thread, ms", "wall, ms"], *(_row(*each) for each in parts.items())],
        [["alive at the peak", "MB"], *([kind, _mb(size)] for kind, size in seen.peak.most_common())],
        [["copies of a step", "by", "calls", "MB"]]
        + [[*key, str(calls), _mb(seen.copied[key])] for key, calls in seen.copies.most_common()],
        [["collectives of a step", "for", "calls", "MB sent"]]
        + [[kind, purpose, str(entry.calls), _mb(entry.bytes)] for (purpose, kind), entry in moved],
    ]


def _row(name: str, part: Part) -> list[str]:
    return [name, *(f"{seconds / max(1, part.calls) * 1e3:.2f}" for seconds in (part.process, part.main, part.wall))]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--plan", default="")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armillary-step-") as folder:
        tables = measure(load_config(options.config, options.overrides, options.plan), Path(folder), options.steps)
    if os.environ.get("RANK", "0") == "0":
        for table in tables:
            print()
            print_table(table)


if __name__ == "__main__":
    leave(guarded(main, "--debug" in sys.argv))
