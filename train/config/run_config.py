"""A run's config: TOML into frozen dataclasses, checked at the edge, every mistake told at once.

The dataclasses stand beside what they configure; this file only composes them. Imports no torch, so that a mistake
is told within a second, and the config stays inert: values, never code.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.parallel.plan import DEGREES, Partition, Plan
from armillary.parallel.zero import ZeroConfig
from armillary.train.checkpoint.store import CheckpointConfig
from armillary.train.config.check import check
from armillary.train.config.table import ConfigError, override, read_table
from armillary.train.data.config import DataConfig
from armillary.train.guard import GuardConfig
from armillary.train.model.shape import ModelConfig
from armillary.train.observe.meter import MetricsConfig
from armillary.train.optim.schedule import OptimConfig
from armillary.train.stages import refusals


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, and where its results go."""

    __pydantic_config__ = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    plan: Plan = field(default_factory=Plan)
    partition: Partition = field(default_factory=Partition)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the sections do not allow together: pairs of key and sentence."""
        if not list(self.plan.problems()):
            yield from refusals(self.plan, self.model, self.data.sequence_length)
        yield from self.zero.conflicts(self.plan, self.partition, self.optim.kind)


def load_config(path: str | Path, overrides: Iterable[str] = (), plan: str = "") -> RunConfig:
    """Reads a TOML file, what it `extends`, the `--set` overrides and the short `--plan`; returns the checked config.

    Args:
        path: the TOML file.
        overrides: texts "section.key=value"; the value is TOML, or else a plain string.
        plan: "tp=2,pp=2", short for plan.tp = 2 and plan.pp = 2; degrees that it leaves out are 1.

    Raises:
        ConfigError: with one line for every mistake: where it stands, the key, what is allowed.
    """
    table = read_table(Path(path))
    # A comma inside brackets belongs to a list: "pp=2,layers=[3,1]".
    shorts = [f"plan.{part.strip()}" for part in re.split(r",(?![^\[]*\])", plan) if part.strip()]
    names = [short.partition("=")[0].rstrip() for short in shorts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--plan: {twice}: is given twice; give it once")
    if shorts and isinstance(table.values.get("plan"), dict):
        table.values["plan"] = {key: value for key, value in table.values["plan"].items() if key not in DEGREES}
    for source, text in [("--set", o) for o in overrides] + [("--plan", s) for s in shorts]:
        try:
            # Python decodes the command line by the locale, which under LANG=C knows no letters but English ones.
            override(table, source, os.fsencode(text).decode())
        except UnicodeError:
            raise ConfigError(f"{source} {text!r}: is not UTF-8 text; write it as such") from None
    config, mistakes = check(RunConfig, table.values)
    lines = [f"{table.origin(key) or path}: {key}: {sentence}" for key, sentence in mistakes]
    if config is None or lines:
        raise ConfigError("\n".join(sorted(set(lines))))
    return config


def check_vocabulary(config: RunConfig, vocab_size: int) -> None:
    """Refuses a model with fewer embeddings than its tokenizer has entries.

    Raises:
        ValueError: naming both keys.
    """
    if config.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is too small for data.tokenizer = {config.data.tokenizer!r}, "
            f"which has {vocab_size} entries; set model.vocab_size = {vocab_size} or more"
        )


def dump_config(config: RunConfig) -> str:
    """The resolved config as TOML; `load_config` gives the same config back."""
    import tomli_w

    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value]
    return value
