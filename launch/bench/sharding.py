"""`armillary bench sharding`: our sharded data parallelism beside DeepSpeed's ZeRO-3 and bare FSDP2, on real ranks."""

import os
import statistics
from dataclasses import dataclass
from typing import Any

from armillary.launch.bench.on_ranks import figures_of
from armillary.launch.rows import Row, print_table, with_facts

RANK = "armillary.launch.bench.sharding_rank"
OURS = "armillary"


@dataclass(frozen=True)
class Work:
    """What the ranks measure: rounds, after one of warm-up, of so many steps of each contender."""

    repetitions: int
    precision: str
    steps: int


def measure(repetitions: int, ranks: str = "2,4", precision: str = "float32", steps: int = 3) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns the rows with the facts of the machine.

    Args:
        repetitions: rounds, each of which starts with another contender, after one of warm-up.
        ranks: numbers of processes, "2,4".
        precision: `optim.precision`.
        steps: of each contender in a round.

    Raises:
        ValueError: for options that make no sense.
        RunStopped, RuntimeError: if a rank fails.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"--precision {precision}: allowed are float32 and bfloat16")
    numbers = [int(part) if part.strip().isdigit() else 0 for part in ranks.split(",")]
    if min(numbers) < 2:
        raise ValueError(f'--ranks {ranks}: write numbers of processes, 2 or more: "2,4"')
    # Before the run, so that the commit is the one that runs.
    run_facts, load = with_facts("sharding", [], repetitions), os.getloadavg()
    rows = [
        row
        for number in numbers
        for row in rows_of(number, figures_of(RANK, number, Work(repetitions, precision, steps))[0])
    ]
    print_table(
        [["ranks", "", "ms a step", "ours is", "MB sent a step", "loss"]]
        + [
            [str(row["ranks"]), row["name"], f"{row['seconds'] * 1e3:.1f}", f"{row['ratio']:.3f}",
             f"{row['bytes'] / 1e6:.2f}", f"{row['loss']:.6f}"]
            for row in rows
        ]
    )  # fmt: skip
    loads = {"before": load, "after": os.getloadavg()}
    return {**run_facts, "rows": rows, "precision": precision, "steps_per_turn": steps, "load": loads}


def rows_of(ranks: int, figures: list[dict[str, Any]]) -> list[Row]:
    """A row for each contender. `ratio`: its median over ours, above 1 where ours is faster. `bytes`: what rank 0 sends
    in a step, by our count; 0 where it is not counted."""
    # A step is over when its slowest rank is.
    seconds = {
        name: [max(times) for times in zip(*(rank["seconds"][name] for rank in figures), strict=True)]
        for name in figures[0]["seconds"]
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "name": name,
            "ranks": ranks,
            "seconds": median,
            "ratio": median / medians[OURS],
            "bytes": figures[0]["bytes"][name],
            "loss": figures[0]["losses"][name],
            "all_seconds": seconds[name],
            "measured": True,
            "note": f"{ranks} ranks on this machine, gloo; ratio: its time over ours",
        }
        for name, median in medians.items()
    ]
