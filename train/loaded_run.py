"""A run's newest checkpoint on one process, to evaluate it or to let it write."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from armillary.parallel.mesh import Ranks, joined_ranks
from armillary.parallel.plan import Partition, Plan
from armillary.parallel.zero import ZeroConfig
from armillary.train.build import build_engine
from armillary.train.checkpoint.restore import load_weights, newest_sound
from armillary.train.config.run_config import RunConfig
from armillary.train.data.tokenizer import Tokenizer, load_tokenizer
from armillary.train.engine import Engine
from armillary.train.model.transformer import Transformer
from armillary.train.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it."""

    config: RunConfig
    engine: Engine
    tokenizer: Tokenizer
    checkpoint: Path
    facts: dict[str, Any]
    """What was saved with the checkpoint."""

    @property
    def model(self) -> Transformer:
        """The whole model."""
        model = self.engine.held.stages[0]
        assert isinstance(model, Transformer)
        return model

    @property
    def step(self) -> int:
        return int(self.facts["progress"]["step"])


@contextmanager
def loaded_run(run: str | Path) -> Iterator[LoadedRun]:
    """Opens a run on this process alone.

    Raises:
        ValueError: if there is no such run, or it has no sound checkpoint.
    """
    folder = open_run(run)
    config = replace(folder.load_config(), plan=Plan(), partition=Partition(), zero=ZeroConfig())
    with joined_ranks(config.plan) as ranks:
        path = newest_checkpoint(folder, ranks, print)
        engine = build_engine(config, ranks)
        facts = load_weights(path, engine.held)
        tokenizer = load_tokenizer(folder.path, "the run's tokenizer")
        yield LoadedRun(config, engine, tokenizer, path, facts)


def newest_checkpoint(folder: RunFolder, ranks: Ranks, note: Callable[[str], None]) -> Path:
    """The run's newest sound checkpoint.

    Raises:
        ValueError: if it has none.
    """
    path = newest_sound(folder.checkpoints, ranks, note)
    if path is None:
        raise ValueError(f"{folder.path}: has no checkpoint yet; continue it: armillary train --resume {folder.path}")
    return path
