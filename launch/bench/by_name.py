"""`armillary bench NAME`: our code beside its peers, on the same work, interleaved in one run."""

import importlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""`name`, `seconds` (median), `ratio`, `bytes`, `measured` or `simulated` (true), `note`, and what else there is."""
BENCHMARKS = {
    "attention": "armillary.launch.bench.attention",
    "compose": "armillary.launch.bench.compose",
    "context": "armillary.launch.bench.context",
    "gpu": "armillary.launch.bench_gpu.run",
    "pipeline": "armillary.launch.bench.pipeline",
    "sharding": "armillary.launch.bench.sharding",
    "train": "armillary.launch.bench.train",
}
"""Module of each benchmark. What `run_benchmark` runs has `rows(repetitions) -> list[Row]`; the others have verbs that
do more."""


def run_benchmark(name: str, repetitions: int) -> dict[str, Any]:
    """Runs a benchmark; prints its rows, and returns them with the facts of the machine.

    Raises:
        ValueError: if there is no benchmark of that name.
    """
    rows = importlib.import_module(module_of(name)).rows(repetitions)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['seconds'] * 1e3:9.2f} ms  ratio {row['ratio']:.3f}  {row['note']}")
    return with_facts(name, rows, repetitions)


def module_of(name: str) -> str:
    """Raises ValueError, with the names there are, if there is no benchmark `name`."""
    if name not in BENCHMARKS:
        raise ValueError(f"bench {name}: there is no such benchmark; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def print_table(lines: list[list[str]]) -> None:
    """Columns as wide as they need to be, under the names in the first line; those of numbers to the right."""
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        numbers = all(cell[:1].isdigit() for cell in column[1:] if cell)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())


def with_facts(name: str, rows: list[Row], repetitions: int) -> dict[str, Any]:
    """The rows as they are written to a file: on which commit, machine and versions, by which command."""
    # Here, so that benchmarks of kernels need none of the packages that only training needs.
    from armillary.train.run_folder import machine_facts

    return {"benchmark": name, "repetitions": repetitions, "commit": commit(), **machine_facts(), "rows": rows}


def commit() -> str:
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
