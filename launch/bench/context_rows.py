"""Rows and tables of `armillary bench context`, from what each rank has measured, and what `auto` would pick.

`ratio` says how many times as fast as all_gather. `exposed_seconds` is the median, over the repetitions, of what a pass
took longer than its tiles alone; `hidden` is the rest of what the transfers take alone, as a share of it.
"""

import statistics
from typing import Any

from armillary.comm.link import Link
from armillary.launch.bench.context_rank import DTYPE, PASSES, WAYS, Work
from armillary.launch.rows import Row, print_table
from armillary.parallel.context.choice import Machine, Shape, choose

PLAIN = "all_gather"
"""What ratios are taken with."""
Pair = tuple[str, str]
"""Pass and strategy."""


def rows_of(work: Work, figures: list[Any]) -> list[Row]:
    """The rows, from the figures of each rank: what a repetition took is what its slowest rank took."""
    cases: list[dict[Pair, Row]] = []
    for case in range(len(work.heads)):
        keys = [(name, strategy) for name in PASSES for strategy in work.strategies]
        cases.append({key: _row(work, figures, case, key) for key in keys})
        for (name, _), row in cases[-1].items():
            row["ratio"] = cases[-1][name, PLAIN]["seconds"] / row["seconds"]
    link = Link(**figures[0]["link"])
    rows = []
    for number, (heads, found) in enumerate(zip(work.heads, cases, strict=True)):
        rows += [*found.values(), *_chosen(work, heads, found, link), _torchs(heads, figures[0]["torch"][number])]
    return rows


def _row(work: Work, figures: list[Any], case: int, key: Pair) -> Row:
    strategy, index, heads = key[1], PASSES.index(key[0]), work.heads[case]
    each = {way: [rank["seconds"][case][strategy][way] for rank in figures] for way in WAYS}
    slowest = {way: [max(pair[index] for pair in turn) for turn in zip(*each[way], strict=True)] for way in WAYS}
    exposed = statistics.median(a - b for a, b in zip(slowest["together"], slowest["tiles"], strict=True))
    wire = statistics.median(slowest["wire"])
    sent = [rank["bytes"][case][strategy][index] for rank in figures]
    return {
        "name": f"{heads[0]}:{heads[1]} {PASSES[index]} {strategy}",
        "strategy": strategy,
        "pass": PASSES[index],
        "heads": list(heads),
        "seconds": statistics.median(slowest["together"]),
        "bytes": sum(sent),
        "bytes_by_rank": sent,
        "tile_seconds": statistics.median(slowest["tiles"]),
        "wire_seconds": wire,
        "exposed_seconds": exposed,
        "hidden": min(1.0, max(0.0, 1 - exposed / wire)),
        "level": figures[0]["level"] if strategy == "hybrid" else None,
        "repetitions": {way: [round(value, 6) for value in slowest[way]] for way in WAYS},
        "measured": True,
        "note": "",
    }


def _chosen(work: Work, heads: tuple[int, int], found: dict[Pair, Row], link: Link) -> list[Row]:
    """The rows of what `auto` picks, told the link that the ranks have measured and how fast their tiles are."""
    shape = Shape(work.num_ranks, work.tokens, *heads, work.head_dim, DTYPE.itemsize)
    flops = work.num_ranks * shape.tile(False, 1.0) / found["forward", PLAIN]["tile_seconds"]
    rows = []
    for name in PASSES:
        choice = choose(shape, Machine(link, flops), name == "backward")
        if (name, choice.strategy) in found:
            best = min(row["seconds"] for (which, _), row in found.items() if which == name)
            row = {**found[name, choice.strategy], "name": f"{heads[0]}:{heads[1]} {name} auto", "note": choice.why}
            rows.append({**row, "strategy": "auto", "choice": choice.strategy, "over_best": row["seconds"] / best})
    return rows


def _torchs(heads: tuple[int, int], error: str) -> Row:
    name = f"{heads[0]}:{heads[1]} torch's context_parallel"
    note = f"refused: {error}" if error else "runs here, and was not timed"
    nothing = {"seconds": None, "ratio": None, "bytes": 0, "measured": False}
    return {"name": name, "strategy": "torch", "pass": "both", "heads": list(heads), **nothing, "note": note}


def print_rows(work: Work, rows: list[Row]) -> None:
    """A table for each case, and what was refused or chosen below it."""
    print(
        f"\n{work.num_ranks} ranks of {work.tokens} tokens, head_dim {work.head_dim}, causal, {work.repetitions} times"
    )
    lines = [["heads, pass, strategy", "ms", "ratio", "MB", "tiles ms", "wire ms", "exposed ms", "hidden"]]
    for row in rows:
        if row["seconds"] is not None and row["strategy"] != "auto":
            times = [f"{row[key] * 1e3:.1f}" for key in ("tile_seconds", "wire_seconds", "exposed_seconds")]
            known = [f"{row['seconds'] * 1e3:.1f}", f"{row['ratio']:.2f}", f"{row['bytes'] / 1e6:.2f}"]
            lines.append([row["name"], *known, *times, f"{row['hidden']:.0%}"])
    print_table(lines)
    for row in rows:
        if row["seconds"] is None:
            print(f"{row['name']}: {row['note']}")
        elif row["strategy"] == "auto":
            print(f"{row['name']}: {row['choice']}, {row['over_best']:.2f} times the best. {row['note']}")
