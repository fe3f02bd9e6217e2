"""Pipeline schedules by name: `plan.schedule`."""

from armillary.parallel.schedule_actions import Action, Schedule, Shape, place_stages
from armillary.parallel.schedule_check import check
from armillary.parallel.schedule_stock import DEFAULT_STAGES, GENERATORS, ONLY_STAGES, SHAPES, stock_schedule

__all__ = ["Action", "SCHEDULES", "Schedule", "Shape", "check", "place_stages", "schedule_named", "stages_per_rank_of"]

SCHEDULES = tuple(GENERATORS)


def stages_per_rank_of(name: str, stages_per_rank: int = 0) -> int:
    """How many stages a rank has under a schedule: `stages_per_rank`, or for 0 what is usual for the schedule.

    Raises:
        ValueError: if there is no such schedule, or it does not allow this number.
    """
    if name not in SCHEDULES:
        raise ValueError(f'plan.schedule = "{name}" is not a schedule; there are: {", ".join(SCHEDULES)}')
    wanted = stages_per_rank or DEFAULT_STAGES[name]
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


def schedule_named(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int = 0) -> Schedule:
    """The schedule of a plan, checked.

    Args:
        name: `plan.schedule`.
        num_ranks: pipeline ranks, `plan.pp`.
        num_micro_batches: `optim.micro_batches`; any number from 1 on.
        stages_per_rank: 0 for what is usual for the schedule.

    Raises:
        ValueError: if there is no such schedule, or it does not allow so many stages.
    """
    per_rank = stages_per_rank_of(name, stages_per_rank)
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(
            f'plan.schedule = "{name}" needs plan.pp and optim.micro_batches of at least 1, not {num_ranks} and '
            f"{num_micro_batches}"
        )
    schedule = stock_schedule(name, num_ranks, num_micro_batches, per_rank)
    check(schedule)
    return schedule
