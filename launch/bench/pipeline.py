"""`armillary bench pipeline`: the bubble of schedules made to measure beside every known one, simulated.

A model of 64 layers on p ranks. The unit of time is the forward of one micro-batch through 1/p of the layers. Cuts: one
stage a rank, two that loop, two as a V; layers are split by `parallel/pipeline/layers.py`. Every rank has room for the
activations of p micro-batches of its own layers (what 1F1B needs), or of 2p; known schedules that need more are listed,
and do not compete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.launch.rows import Row, print_table, with_facts
from armillary.parallel.pipeline.layers import LayerCosts, split_layers
from armillary.parallel.schedule.actions import Shape, place_stages
from armillary.parallel.schedule.simulator import Costs
from armillary.parallel.schedule.synthesis import Synthesis, synthesise

NUM_LAYERS = 64
CUTS: dict[str, tuple[int, Shape]] = {"1 stage": (1, "loop"), "2 looped": (2, "loop"), "2 as V": (2, "v")}
ROOMS = (1, 2)
"""Room for activations: micro-batches that a rank can hold, divided by p."""


@dataclass(frozen=True)
class Profile:
    """What the parts of a model cost, relative to a layer's forward."""

    back: float = 1.0
    weight: float = 1.0
    embedding: float = 0.0
    """Layers that the embedding costs as much as."""
    head: float = 0.0
    slow: float = 1.0
    """Relative speed of the rank in the middle."""
    hop: float = 0.0
    """Of one transfer, relative to the unit of time."""


PROFILES = {
    "even": Profile(),
    "1, 1.3, 0.7": Profile(1.3, 0.7),
    "recompute": Profile(2.0, 1.0),
    "heavy head": Profile(embedding=0.5, head=4.0),
    "slow rank": Profile(slow=0.6),
    "10 % hop": Profile(hop=0.1),
}


def cut_costs(profile: Profile, num_ranks: int, stage_ranks: Sequence[int]) -> tuple[Costs, list[float]]:
    """Costs of each stage of a cut, and the activations of one micro-batch that each rank holds."""
    unit = num_ranks / NUM_LAYERS
    work = LayerCosts((unit,) * NUM_LAYERS, unit * profile.embedding, unit * profile.head)
    speeds = [profile.slow if rank == num_ranks // 2 else 1.0 for rank in range(num_ranks)]
    counts = split_layers(work, stage_ranks, speeds)
    forward = tuple(c / speeds[r] for c, r in zip(work.of_stages(counts), stage_ranks, strict=True))
    held = [0.0] * num_ranks
    for count, rank in zip(counts, stage_ranks, strict=True):
        held[rank] += unit * count
    return Costs(
        forward,
        tuple(profile.back * seconds for seconds in forward),
        tuple(profile.weight * seconds for seconds in forward),
        hops=(profile.hop,) * (len(stage_ranks) - 1),
        activations=tuple(unit * count for count in counts),
    ), held


def read_ranks(text: str) -> list[int]:
    """The numbers of `--ranks`.

    Raises:
        ValueError: for anything but numbers of ranks that have enough layers for two stages each.
    """
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= NUM_LAYERS // 2 for number in numbers):
        raise ValueError(f"bench pipeline: --ranks {text}: give numbers from 1 to {NUM_LAYERS // 2}, such as 4,8,16")
    return numbers


def measure(ranks: Sequence[int] = (4, 8, 16), effort: int = 120, picture: Path | None = None) -> dict[str, Any]:
    """Simulates every case, prints a line for each, and returns the rows with the facts of the machine.

    Args:
        ranks: pipeline ranks p, with p, 2p and 4p micro-batches each.
        effort: of the searches, see `synthesise`.
        picture: a PNG file for the timelines of some schedules.
    """
    rows = [
        _row(num_ranks, factor * num_ranks, name, room, effort)
        for num_ranks in ranks
        for factor in (1, 2, 4)
        for name in PROFILES
        for room in ROOMS
    ]
    print_table([COLUMNS, *(_line(row) for row in rows)])
    if picture is not None:
        from armillary.launch.bench.pipeline_picture import draw

        draw(picture)
    return with_facts("pipeline", rows, 1)


def _row(num_ranks: int, num: int, name: str, room: int, effort: int) -> Row:
    made: dict[str, Synthesis] = {}
    for cut, (per_rank, shape) in CUTS.items():
        stage_ranks = place_stages(num_ranks, per_rank, shape)
        costs, held = cut_costs(PROFILES[name], num_ranks, stage_ranks)
        made[cut] = synthesise(stage_ranks, num, costs, [room * num_ranks * h for h in held], effort=effort)
    stock = {
        f"{known} ({cut})": {
            "bubble": round(run.bubble, 4),
            "makespan": round(run.makespan, 4),
            "fits": known in made[cut].fitting,
        }
        for cut in CUTS
        for known, run in made[cut].stock.items()
    }
    best_stock = min((s for s in stock if stock[s]["fits"]), key=lambda s: float(stock[s]["makespan"]))
    cut = min(CUTS, key=lambda c: made[c].simulation.makespan)
    return {
        "name": f"p={num_ranks} m={num} {name}, room for {room * num_ranks}",
        "ranks": num_ranks,
        "micro_batches": num,
        "profile": name,
        "room": room * num_ranks,
        "seconds": round(made[cut].simulation.makespan, 4),
        "ratio": round(float(stock[best_stock]["makespan"]) / made[cut].simulation.makespan, 4),
        "bytes": 0,
        "simulated": True,
        "stock": stock,
        "best_stock": best_stock,
        "synthesised": {name: _told(synthesis) for name, synthesis in made.items()},
        "best_cut": cut,
    }


def _told(made: Synthesis) -> dict[str, Any]:
    return {
        "bubble": round(made.simulation.bubble, 4),
        "makespan": round(made.simulation.makespan, 4),
        "to_bound": round(made.ratio, 4),
        # None where no known schedule fits the memory.
        "over_best_stock": round(made.best_stock / made.simulation.makespan, 4) if made.fitting else None,
        "peak": round(max(made.simulation.peaks), 3),
    }


COLUMNS = ["p", "m", "costs", "room", "best known", "bubble", "synthesised", "bubble", "faster", "to bound"]


def _line(row: Row) -> list[str]:
    stock, made = row["stock"][row["best_stock"]], row["synthesised"][row["best_cut"]]
    return [
        str(row["ranks"]),
        str(row["micro_batches"]),
        row["profile"],
        str(row["room"]),
        row["best_stock"],
        f"{100 * stock['bubble']:.1f} %",
        row["best_cut"],
        f"{100 * made['bubble']:.1f} %",
        f"{row['ratio']:.3f}",
        f"{made['to_bound']:.3f}",
    ]
