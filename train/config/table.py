"""The values of a config as they were written: a TOML file, what it extends, overrides; and who said each of them."""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """One or several mistakes in a config, one line each."""


@dataclass(frozen=True)
class Table:
    """Values of any shape, not yet checked."""

    values: dict[str, Any]
    origins: dict[str, str]
    """The file or option that said each dotted key."""

    def origin(self, key: str) -> str | None:
        """Who said a key, such as `data.sources[0].path`, or else the innermost table around it; None if nobody did."""
        parts = key.split("[")[0].split(".")
        names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.origins[name] for name in names if name in self.origins), None)


def read_table(path: Path, parents: tuple[Path, ...] = ()) -> Table:
    """A file merged over those it extends; `parents` are the files that lead to it.

    Raises:
        ConfigError: if one of them cannot be read, is no TOML, or extends itself.
    """
    real = Path(os.path.realpath(path))
    if real in parents:
        raise ConfigError(f"{path}: extends itself, through {parents[-1]}; remove one `extends`")
    by = f", which {parents[-1]} extends" if parents else ""
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        base = read_table(path.parent / name, (*parents, real))
        _merge(values, base.values)
        origins |= base.origins
    _merge(values, own)
    origins |= dict.fromkeys(_dotted(own), str(path))
    return Table(values, origins)


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


def override(table: Table, source: str, text: str) -> None:
    """Sets what "section.key=value" says; `source` is the option that it was given to.

    Raises:
        ConfigError: if it says nothing.
    """
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
    *outer, last = key.split(".")
    place = table.values
    for depth, name in enumerate(outer, 1):
        if name not in place:
            table.origins[".".join(outer[:depth])] = source
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{source} {text}: {name} is not a table")
    place[last] = value
    said = dict.fromkeys([key, *(_dotted(value, key + ".") if isinstance(value, dict) else ())], source)
    table.origins.update(said)
