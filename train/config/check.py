"""Plain values into frozen dataclasses: kinds, bounds and rules are checked, and every mistake is told at once.

A dataclass says its bounds in the metadata of its fields (`min`, `above`, `max`, `below`), and what its fields do not
allow together in a method `problems`, which yields pairs of key and sentence. Imports no torch.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def check(kind: type[T], values: Mapping[str, Any]) -> tuple[T | None, list[tuple[str, str]]]:
    """The values as a `kind`, or else None; and every mistake in them as a pair of dotted key and sentence."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # By way of JSON: there, strict means that "3" is no number, while a list still becomes a tuple.
        config = TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        return None, [_explain(kind, problem) for problem in error.errors()]
    return config, list(_problems(config, ""))


def _explain(kind: type, problem: Mapping[str, Any]) -> tuple[str, str]:
    """Dotted key and sentence of one of pydantic's errors."""
    # Of a type such as `A | None`, pydantic's place has the name of the class too; an unknown key stands at its end.
    unknown = problem["type"] == "unexpected_keyword_argument"
    *inner, last = problem["loc"]
    location = [part for part in inner if isinstance(part, int) or not part[:1].isupper()]
    location += [last] if unknown or isinstance(last, int) or not last[:1].isupper() else []
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if unknown:
        allowed = _allowed_keys(kind, location[:-1])
        name = str(location[-1])
        near = difflib.get_close_matches(name.lower(), allowed, 1, 0.5)
        prefix = key[: -len(name)]
        hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
        return key, f"unknown key; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return key, "is required and has no value; give it one"
    message = problem["msg"].removeprefix("Input ")
    return key, f"{message}; it is {problem['input']!r}"


def _allowed_keys(kind: Any, location: Iterable[str | int]) -> list[str]:
    """Keys of the dataclass that stands at a place in a `kind`."""
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
