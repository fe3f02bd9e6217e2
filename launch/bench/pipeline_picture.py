"""Timelines of pipeline schedules as a picture: what each rank computes when, and where it waits."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from armillary.parallel.schedule.actions import Schedule
from armillary.parallel.schedule.by_name import schedule_named
from armillary.parallel.schedule.simulator import Costs, Simulation, even_costs, simulate
from armillary.parallel.schedule.synthesis import synthesise
from armillary.train.files import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"F": "#7fb2e5", "B": "#4d9a5b", "I": "#86c98f", "W": "#f0c36d"}
WORDS = {"F": "forward", "B": "backward", "I": "backward to inputs", "W": "backward to weights"}
NUM_RANKS, NUM = 4, 6
FORWARD, BACK, WEIGHT, HOP = 1.0, 1.3, 0.7, 0.1


def _costs(per_rank: int) -> Costs:
    return even_costs(NUM_RANKS * per_rank, FORWARD / per_rank, BACK / per_rank, WEIGHT / per_rank, HOP)


def draw(file: Path) -> None:
    """Writes a PNG: 1F1B, interleaved, ZB1P, ZBV and one made to measure, on one scale of time."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    known = [("1F1B", "1f1b", 1), ("interleaved", "interleaved", 2), ("ZB1P", "zb1p", 1), ("ZBV", "zbv", 2)]
    shown: list[tuple[str, Schedule, Simulation]] = []
    for title, name, per_rank in known:
        schedule = schedule_named(name, NUM_RANKS, NUM, per_rank)
        shown.append((title, schedule, simulate(schedule, _costs(per_rank))))
    room = [2.0 * NUM_RANKS] * NUM_RANKS
    made = synthesise(schedule.stage_ranks, NUM, _costs(2), room)
    shown.append(("synthesised, as V", made.schedule, made.simulation))
    end = max(run.makespan for _, _, run in shown)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 8.2), layout="constrained")
        for axes, (title, schedule, run) in zip(figure.subplots(len(shown), sharex=True), shown, strict=True):
            _timeline(axes, schedule, run)
            axes.set_title(f"{title}: {run.makespan:.1f}, bubble {100 * run.bubble:.1f} %", loc="left", fontsize=10)
            axes.set_xlim(0, end)
        costs = f"F, I, W = {FORWARD:g}, {BACK:g}, {WEIGHT:g}, hops of {HOP:g}"
        axes.set_xlabel(f"time (simulated); p = {NUM_RANKS}, m = {NUM}, {costs}")
        keys = [Patch(facecolor=COLORS[kind], label=word) for kind, word in WORDS.items()]
        keys.append(Patch(facecolor="none", edgecolor="#333333", label="framed: second stage of the rank"))
        figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    write_aside(file, drawn.getvalue())


def _timeline(axes: "Axes", schedule: Schedule, run: Simulation) -> None:
    for rank, spans in enumerate(run.spans):
        first = schedule.stages_of(rank)[0]
        for action, start, end in spans:
            second = action.stage != first
            axes.barh(
                rank,
                end - start,
                left=start,
                height=0.86,
                color=COLORS[action.kind],
                edgecolor="#333333" if second else "white",
                linewidth=0.9 if second else 0.5,
            )
            axes.text((start + end) / 2, rank, str(action.micro_batch), ha="center", va="center", fontsize=6.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
