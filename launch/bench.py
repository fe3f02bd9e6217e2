"""`armillary bench NAME`: our code beside its peers, on the same work, interleaved in one run."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from armillary.train.run_folder import machine_facts

CONFIG = Path("configs/demo.toml")
STEPS_PER_TURN = 3


def run_benchmark(name: str, repetitions: int) -> dict[str, Any]:
    """Runs a benchmark; prints and returns its rows: `name`, `seconds` (median), `ratio`, `bytes`, `measured`.

    Raises:
        ValueError: if there is no benchmark of that name.
    """
    benchmarks: dict[str, Callable[[int], list[dict[str, Any]]]] = {"train": bench_train}
    if name not in benchmarks:
        raise ValueError(f"bench {name}: there is no such benchmark; there are: {', '.join(benchmarks)}")
    rows = benchmarks[name](repetitions)
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['seconds'] * 1e3:9.1f} ms  ratio {row['ratio']:.3f}  {row['note']}")
    return {"benchmark": name, "repetitions": repetitions, "commit": _commit(), **machine_facts(), "rows": rows}


def _commit() -> str:
    """The commit of the working tree, with a mark if it differs; empty where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()


def interleaved(turns: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each turn, taken in rounds, each of which starts with another one, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for repetition in range(repetitions + 1):
        start = repetition % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            turns[name]()
            if repetition > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def bench_train(repetitions: int) -> list[dict[str, Any]]:
    """A trainer's whole step, with data, guard and metrics, against a bare loop over the same model and batch."""
    import torch

    from armillary.parallel.mesh import joined_ranks
    from armillary.parallel.plan import Plan
    from armillary.train.config import load_config
    from armillary.train.data import prepare
    from armillary.train.run_folder import RunFolder
    from armillary.train.trainer import Trainer

    torch.set_num_threads(1)
    config = load_config(CONFIG)
    # The plain loop has torch's AdamW, so the trainer gets it too; it never comes to its last step.
    optim = replace(config.optim, kind="adamw", steps=10**6)
    config = replace(config, plan=Plan(), optim=optim, metrics=replace(config.metrics, wandb="off"))
    dataset = prepare(config.data, print)
    with tempfile.TemporaryDirectory(prefix="armillary-bench-") as folder, joined_ranks(config.plan) as ranks:
        trainer = Trainer(config, ranks, RunFolder(Path(folder)), dataset, "bench")
        turns = {"bare loop": _bare_loop(trainer), "armillary": lambda: _repeat(trainer.train_step)}
        seconds = interleaved(turns, repetitions)
        trainer.observer.close("finished")
    medians = {name: statistics.median(times) / STEPS_PER_TURN for name, times in seconds.items()}
    tokens = config.data.batch_size * config.data.sequence_length
    return [
        {
            "name": name,
            "seconds": median,
            "ratio": medians["bare loop"] / median,
            "bytes": 0,
            "measured": True,
            "note": f"{tokens / median:,.0f} tokens/s, one step of {tokens} tokens, 1 process, 1 thread",
        }
        for name, median in medians.items()
    ]


def _repeat(step: Callable[[], None]) -> None:
    for _ in range(STEPS_PER_TURN):
        step()


def _bare_loop(trainer: Any) -> Callable[[], None]:
    """What one would write by hand: the same model, batch and optimizer, and nothing else."""
    import torch

    from armillary.kernels.places import Places
    from armillary.train.build import COMPUTE
    from armillary.train.model import Transformer, initialise

    optim = trainer.config.optim
    model = Transformer(trainer.config.model)
    initialise(model, trainer.config.model.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.learning_rate, fused=True)
    batch = trainer.take_batches()[0]
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    places = Places.of(batch.positions, batch.documents)
    num_labels = int((labels >= 0).sum())
    compute = COMPUTE[optim.precision]

    def step() -> None:
        with torch.autocast("cpu", compute, enabled=compute == torch.bfloat16):
            loss = model(tokens, places, labels) / num_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return lambda: _repeat(step)
