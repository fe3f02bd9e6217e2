"""Places beside `metrics.jsonl` that get its rows too: Weights & Biases and TensorBoard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from armillary.train.observe.metrics_file import plain

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Sink:
    """A place, once it is open."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[Ending], None]


def open_wandb(folder: Path, project: str, online: bool, identity: str, facts: Mapping[str, Any]) -> Sink:
    """A run called as its folder; `facts` is what it shows as the config."""
    import wandb

    # It must neither write over the status line nor ask for a login, and a remote's address may hold a password.
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30)
    wandb.setup(settings=settings)
    run = wandb.init(
        project=project,
        name=folder.name,
        id=identity,
        dir=str(folder),
        config=plain(facts),
        mode="online" if online else "offline",
        resume="allow" if online else None,
        settings=settings,
    )
    # Its own counter refuses to go back, as a rollback does.
    run.define_metric("*", step_metric="step")

    def close(status: Ending) -> None:
        if status == "stopped":
            run.mark_preempting()
        run.finish(exit_code=0 if status == "finished" else 1)

    return Sink(lambda step, values: run.log({"step": step, **values}), close)


def open_tensorboard(folder: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(log, lambda status: writer.close())
