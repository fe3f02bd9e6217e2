"""What a run's folder tells, whatever lies in it; and the numbers in rows of any shape.

`config.toml`, `run.json` (versions and host, any shape), `sample.txt`, and `metrics.jsonl` with metrics and events. The
latest event "begin" or "resume" may carry `parameters`, `ranks`, `flops_per_token`, `peak_flops` (operations per second
of all ranks) and `peak_origin`.
"""

import json
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.train.observe.metrics_file import FILE, Row, latest_per_step, read_metrics

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Story:
    """A run as its folder tells it."""

    name: str
    rows: list[Row]
    """Metrics, one row for each step."""
    events: list[Row]
    start: Row
    """Facts of the latest start: what MFU was computed from, the number of ranks and parameters."""
    total_steps: int | None
    seconds: float
    """Time in which the run was running."""
    starts: int
    config: str
    machine: list[tuple[str, str]]
    """Names and values."""
    sample: str


def read_story(run: Path) -> Story:
    """The story of a run's folder; what is missing or broken there is left out."""
    rows = read_metrics(run / FILE) if (run / FILE).is_file() else []
    events = [row for row in rows if "event" in row]
    config, machine = _text(run / "config.toml"), _text(run / "run.json")
    machine_facts = [("run.json", machine)] if machine else []
    with suppress(ValueError, RecursionError):
        machine_facts = _flat(json.loads(machine))
    steps = None
    with suppress(ValueError, AttributeError, RecursionError):
        steps = tomllib.loads(config).get("optim", {}).get("steps")
    started = [event for event in events if event["event"] in ("begin", "resume")]
    seconds, starts = _running(rows)
    return Story(
        name=run.resolve().name,
        rows=latest_per_step(rows),
        events=events,
        start=started[-1] if started else {},
        total_steps=steps if isinstance(steps, int) else None,
        seconds=seconds,
        starts=starts,
        config=config,
        machine=machine_facts,
        sample=_text(run / "sample.txt"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _running(rows: Sequence[Row]) -> tuple[float, int]:
    """Seconds from each start to the last word before the next one, together, and the number of starts."""
    total, starts, begin, last = 0.0, 0, None, 0.0
    for row in rows:
        now = number_of(row.get("time"))
        if now is None:
            continue
        if begin is None or row.get("event") == "open":
            total += last - begin if begin is not None else 0.0
            starts, begin = starts + 1, now
        last = now
    return (total + last - begin if begin is not None else 0.0), starts


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Leaves of nested JSON with their dotted names."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return [] if value is None else [(name, str(value))]


def number_of(value: Any) -> float | None:
    """The value as a number that can be plotted, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)


def points_of(rows: Iterable[Row], name: str, along: str = "step") -> Points:
    """The finite values of a metric along another."""
    pairs = ((number_of(row.get(along)), number_of(row.get(name))) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def values_of(rows: Iterable[Row], name: str) -> list[float]:
    """The finite values of a metric."""
    return [y for _, y in points_of(rows, name)]
