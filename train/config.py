"""A run's config: TOML into frozen dataclasses, checked at the edge, every mistake told at once.

The dataclasses stand beside what they configure; this file only composes them. Imports no torch, so that a mistake
is told within a second, and the config stays inert: values, never code.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.parallel.plan import DEGREES, Partition, Plan
from armillary.parallel.zero import ZeroConfig
from armillary.train.checkpoint.store import CheckpointConfig
from armillary.train.data.dataset import DataConfig
from armillary.train.guard import GuardConfig
from armillary.train.metrics import MetricsConfig
from armillary.train.model.shape import ModelConfig
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


class ConfigError(ValueError):
    """One or several mistakes in a config, one line each."""


def load_config(path: str | Path, overrides: Iterable[str] = (), plan: str = "") -> RunConfig:
    """Reads a TOML file, what it `extends`, the `--set` overrides and the short `--plan`; returns the checked config.

    Args:
        path: the TOML file.
        overrides: texts "section.key=value"; the value is TOML, or else a plain string.
        plan: "tp=2,pp=2", short for plan.tp = 2 and plan.pp = 2; degrees that it leaves out are 1.

    Raises:
        ConfigError: with one line for every mistake: where it stands, the key, what is allowed.
    """
    values, origins = _read(Path(path), ())
    # A comma inside brackets belongs to a list: "pp=2,layers=[3,1]".
    shorts = [f"plan.{part.strip()}" for part in re.split(r",(?![^\[]*\])", plan) if part.strip()]
    names = [short.partition("=")[0].rstrip() for short in shorts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--plan: {twice}: is given twice; give it once")
    if shorts and isinstance(values.get("plan"), dict):
        values["plan"] = {key: value for key, value in values["plan"].items() if key not in DEGREES}
    for source, text in [("--set", o) for o in overrides] + [("--plan", s) for s in shorts]:
        _override(values, origins, source, text)
    return _validate(values, origins, str(path))


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


def _read(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged table of a file and those it extends, and for each dotted key the file that said it."""
    real = Path(os.path.realpath(path))
    if real in parents:
        raise ConfigError(f"{path}: extends itself, through {parents[-1]}; remove one `extends`")
    by = f", which {parents[-1]} extends" if parents else ""
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; configs/ holds examples"
        raise ConfigError(f"{path}{by}: there is no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{by}: cannot be read as a text file ({error}); name a TOML file") from None
    except (ValueError, RecursionError) as error:  # besides its own: an integer of thousands of digits
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    extends = own.pop("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise ConfigError(f'{path}: extends: takes a file, or a list of files, such as "base.toml"; it is {extends!r}')
    for name in names:
        base, base_origins = _read(path.parent / name, (*parents, real))
        _merge(values, base)
        origins |= base_origins
    _merge(values, own)
    origins |= dict.fromkeys(_dotted(own), str(path))
    return values, origins


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _override(values: dict[str, Any], origins: dict[str, str], source: str, text: str) -> None:
    key, equals, literal = text.partition("=")
    key = key.strip()
    if source == "--plan" and not (equals and key != "plan."):
        raise ConfigError(f'--plan {key.removeprefix("plan.")}: write it as degree=number, for example "dp=2"')
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{source} {text}: write it as section.key=value, for example optim.steps=100")
    try:
        value = tomllib.loads(f"value = {literal.strip()}")["value"]
    except (ValueError, RecursionError):
        value = literal.strip()
    *tables, last = key.split(".")
    table = values
    for depth, name in enumerate(tables, 1):
        if name not in table:
            origins[".".join(tables[:depth])] = source
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{source} {text}: {name} is not a table")
        table = inner
    table[last] = value
    origins |= dict.fromkeys([key, *(_dotted(value, key + ".") if isinstance(value, dict) else ())], source)


def _validate(values: dict[str, Any], origins: dict[str, str], path: str) -> RunConfig:
    from pydantic import TypeAdapter, ValidationError

    def line(key: str, message: str) -> str:
        parts = key.split("[")[0].split(".")
        said = next((origins[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in origins), path)
        return f"{said}: {key}: {message}"

    try:
        # By way of JSON: there, strict means that "3" is no number, while a list still becomes a tuple.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [line(*_explain(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(sorted(set(lines)))) from None
    lines = [line(key, message) for key, message in _problems(config, "")]
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def _explain(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Dotted key and sentence of one of pydantic's errors."""
    # Of a type such as `A | None`, pydantic's place has the name of the class too; an unknown key stands at its end.
    unknown = problem["type"] == "unexpected_keyword_argument"
    *inner, last = problem["loc"]
    location = [part for part in inner if isinstance(part, int) or not part[:1].isupper()]
    location += [last] if unknown or isinstance(last, int) or not last[:1].isupper() else []
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if unknown:
        allowed = _allowed_keys(location[:-1])
        name = str(location[-1])
        near = difflib.get_close_matches(name.lower(), allowed, 1, 0.5)
        prefix = key[: -len(name)]
        hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
        return key, f"unknown key; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return key, "is required and has no value; give it one"
    message = problem["msg"].removeprefix("Input ")
    return key, f"{message}; it is {problem['input']!r}"


def _allowed_keys(location: Iterable[str | int]) -> list[str]:
    """Keys of the dataclass that stands at a place in the config."""
    kind: Any = RunConfig
    for part in location:
        if isinstance(part, str):
            kind = next(c for c in _classes(typing.get_type_hints(kind)[part]))
    return [f.name for f in dataclasses.fields(kind)]


def _classes(hint: Any) -> Iterator[type]:
    """The dataclasses in a type such as `A | None` or `tuple[A, ...]`."""
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint)
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) in (tuple, typing.Union):
        for inner in typing.get_args(hint):
            yield from _classes(inner)


def _problems(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Bounds and cross-field rules of a dataclass and of those inside it: pairs of dotted key and sentence."""
    within = True
    for spec in dataclasses.fields(config):
        value, key = getattr(config, spec.name), prefix + spec.name
        for sentence in _out_of_bounds(value, spec.metadata):
            within = False
            yield key, sentence
        for index, inner in enumerate(value if isinstance(value, tuple) else [value]):
            if dataclasses.is_dataclass(inner):
                yield from _problems(inner, f"{key}[{index}]." if isinstance(value, tuple) else f"{key}.")
    if within and hasattr(config, "problems"):
        yield from ((prefix + key, message) for key, message in config.problems())


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(value, int) and abs(value) >= 2**63:
        yield f"must be below 2**63; it is {value}"
        return
    if value is None or not bounds:
        return
    if isinstance(value, float) and not math.isfinite(value):
        yield f"must be a finite number; it is {value}"
        return
    rules = {
        "min": (lambda v, b: v >= b, "at least"),
        "above": (lambda v, b: v > b, "greater than"),
        "max": (lambda v, b: v <= b, "at most"),
        "below": (lambda v, b: v < b, "less than"),
    }
    for name, bound in bounds.items():
        holds, words = rules[name]
        if not holds(value, bound):
            yield f"must be {words} {bound}; it is {value}"
