"""Pipeline schedules by name: `plan.schedule`."""

from collections.abc import Sequence

from armillary.parallel.schedule.actions import Action, Schedule, Shape, place_stages
from armillary.parallel.schedule.check import check
from armillary.parallel.schedule.simulator import Costs, even_costs
from armillary.parallel.schedule.stock import (
    DEFAULT_STAGES,
    GENERATORS,
    ONLY_STAGES,
    SHAPES,
    SYNTHESISED,
    stock_schedule,
)
from armillary.parallel.schedule.synthesis import synthesise

__all__ = [
    "SCHEDULES",
    "Action",
    "Schedule",
    "check",
    "place_stages",
    "schedule_named",
    "shape_of",
    "stages_per_rank_of",
]

SCHEDULES = (*GENERATORS, SYNTHESISED)


def stages_per_rank_of(name: str, stages_per_rank: int = 0) -> int:
    """How many stages a rank has under a schedule: `stages_per_rank`, or for 0 what is usual for the schedule.

    Raises:
        ValueError: if there is no such schedule, or it does not allow this number.
    """
    if name not in SCHEDULES:
        raise ValueError(f'plan.schedule = "{name}" is not a schedule; there are: {", ".join(SCHEDULES)}')
    wanted = stages_per_rank or DEFAULT_STAGES.get(name, 1)
    if wanted < 1:
        raise ValueError(f"plan.stages_per_rank = {wanted} must be at least 1; leave it out for the schedule's own")
    only = ONLY_STAGES.get(name, wanted)
    if wanted != only:
        hint = ', or plan.schedule = "interleaved" for more' if name == "1f1b" else ""
        raise ValueError(
            f'plan.schedule = "{name}" has exactly {only} stage{"s" if only > 1 else ""} a rank, not '
            f"plan.stages_per_rank = {wanted}; leave that key out{hint}"
        )
    return wanted


def shape_of(name: str) -> Shape:
    """How a schedule lays the stages on the ranks."""
    return SHAPES.get(name, "loop")


def schedule_named(
    name: str,
    num_ranks: int,
    num_micro_batches: int,
    stages_per_rank: int = 0,
    costs: Costs | None = None,
    limits: Sequence[float] | None = None,
    split: bool = True,
) -> Schedule:
    """The schedule of a plan, checked.

    Args:
        name: `plan.schedule`.
        num_ranks: pipeline ranks, `plan.pp`.
        num_micro_batches: `optim.micro_batches`; any number from 1 on.
        stages_per_rank: 0 for what is usual for the schedule.
        costs, limits, split: what `synthesise` takes, for `synthesised`; the others ignore them. Without costs, F, I
            and W of each stage take equally long. All ranks have to give the same numbers.

    Raises:
        ValueError: if there is no such schedule, it does not allow so many stages, or the limits are too low.
    """
    per_rank = stages_per_rank_of(name, stages_per_rank)
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(
            f'plan.schedule = "{name}" needs plan.pp and optim.micro_batches of at least 1, not {num_ranks} and '
            f"{num_micro_batches}"
        )
    if name == SYNTHESISED:
        stage_ranks = place_stages(num_ranks, per_rank, shape_of(name))
        known = costs or even_costs(len(stage_ranks))
        return synthesise(stage_ranks, num_micro_batches, known, limits, split).schedule
    schedule = stock_schedule(name, num_ranks, num_micro_batches, per_rank)
    check(schedule)
    return schedule
