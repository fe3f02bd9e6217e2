"""`armillary bench compose`: plans that compose axes beside the same assembled by hand from torch's pieces; and growth.

Both sides are whole training steps on the same ranks, weights and batches, in float32, in turns. The ranks first hold
losses and gradient norms against each other, so that what is timed is the same work.
"""

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from armillary.launch.bench.compose_cases import PLANS, SIZES, Case, Work, cases, growth_cases, num_ranks
from armillary.launch.bench.on_ranks import figures_of
from armillary.launch.rows import Row, print_table, with_facts

RANK = "armillary.launch.bench.compose_rank"


def measure(repetitions: int, size: str = "medium", plans: str = "", growth: bool = False) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns the rows with the facts of the machine.

    Args:
        repetitions: turns of each side of a case, after three steps of warm-up.
        size: names of `SIZES`, with commas between.
        plans: names of `PLANS`, with commas between; empty for all.
        growth: ours alone with more ranks, longer sequences and wider models instead.

    Raises:
        ValueError: for a name that there is not.
        RunStopped, RuntimeError: if a rank fails, or the two sides do not compute the same.
    """
    names = _names("--plans", plans, PLANS) if plans else list(PLANS)
    chosen = [case for name in _names("--size", size, SIZES) for case in cases(name, names)]
    # Before the run, so that the commit is the one that runs.
    facts, load = with_facts("compose", [], repetitions), os.getloadavg()
    rows = run(growth_cases() if growth else chosen, repetitions)
    _print(rows)
    loads = {"before": load, "after": os.getloadavg()}
    return {**facts, "rows": rows, "dtype": "float32", "threads": 1, "load": loads}


def _names(option: str, text: str, allowed: dict[str, Any]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} {name}: there is no such name; there are {', '.join(allowed)}")
    return names


def run(chosen: list[Case], repetitions: int) -> list[Row]:
    """The rows of cases, whose ranks are started once for each number of them."""
    rows: list[Row] = []
    for ranks, group in groupby(sorted(chosen, key=num_ranks), key=num_ranks):
        work = Work(tuple(group), repetitions)
        by_rank, _ = figures_of(RANK, ranks, work)
        for case, figures in zip(work.cases, zip(*by_rank, strict=True), strict=True):
            rows += rows_of(case, figures)
    return rows


def rows_of(case: Case, figures: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each side. `seconds`: median of the turns, for one step. `ratio`: by hand over ours, above 1 where ours
    is faster. `processor_seconds`: what all ranks together computed, which other work on the machine stretches less.
    `bytes`: what all ranks together send in a step of ours, by the ledger; 0 for the other, which has none.
    """
    # Ranks leave a turn together, so that they differ by no more than a barrier.
    seconds = {
        side: [max(turn) for turn in zip(*_of(figures, "seconds", side), strict=True)] for side in figures[0]["seconds"]
    }
    spent = {side: [sum(turn) for turn in zip(*_of(figures, "processor", side), strict=True)] for side in seconds}
    medians = {side: statistics.median(turns) for side, turns in seconds.items()}
    computed = {side: statistics.median(turns) for side, turns in spent.items()}
    moved: Counter[str] = Counter()
    for rank in figures:
        moved.update(rank["bytes"])
    theirs = "by hand" if case.by_hand else "ours"
    tokens = case.size.batch * case.size.seq
    return [
        {
            "name": f"{case.name}: {side}",
            "case": case.name,
            "side": side,
            "plan": case.plan,
            "ranks": len(figures),
            "size": vars(case.size),
            "seconds": median,
            "ratio": medians[theirs] / median,
            "spread": [min(seconds[side]), max(seconds[side])],
            "processor_seconds": computed[side],
            "processor_ratio": computed[theirs] / computed[side],
            "bytes": sum(moved.values()) if side == "ours" else 0,
            "bytes_by_purpose": dict(moved) if side == "ours" else {},
            "calls": figures[0]["calls"] if side == "ours" else 0,
            "loss_difference": max(rank["difference"] for rank in figures),
            "load": figures[0]["load"],
            "turns": len(seconds[side]),
            "measured": True,
            "note": f"{tokens / median:,.0f} tokens/s",
        }
        for side, median in medians.items()
    ]


def _of(figures: Sequence[dict[str, Any]], what: str, side: str) -> list[list[float]]:
    return [rank[what][side] for rank in figures]


def _print(rows: list[Row]) -> None:
    head = ["", "ranks", "ms a step", "ratio", "processor ms", "ratio", "MB sent", "calls", "load"]
    lines = [
        [
            row["name"],
            str(row["ranks"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['processor_seconds'] * 1e3:.0f}",
            f"{row['processor_ratio']:.3f}",
            f"{row['bytes'] / 1e6:.2f}" if row["bytes"] else "",
            str(row["calls"] or ""),
            f"{row['load'][0]:.1f}",
        ]
        for row in rows
    ]
    print_table([head, *lines])
