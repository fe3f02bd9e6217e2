"""`armillary bench train`: a trainer's whole step beside a bare loop over the same model and batch."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from armillary.launch.bench.turns import interleaved
from armillary.launch.rows import Row

CONFIG = Path("configs/demo.toml")
STEPS_PER_TURN = 3


def rows(repetitions: int) -> list[Row]:
    """A trainer's whole step, with data, guard and metrics, against a bare loop over the same model and batch."""
    import torch

    from armillary.parallel.mesh import joined_ranks
    from armillary.parallel.plan import Plan
    from armillary.train.config.run_config import load_config
    from armillary.train.data.dataset import prepare
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

    from armillary.kernels.attention.places import Places
    from armillary.train.model.transformer import Transformer, initialise
    from armillary.train.precision import COMPUTE

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
