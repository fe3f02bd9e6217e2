"""Pipeline schedules by name: `plan.schedule`."""

from collections.abc import Sequence

from armillary.parallel.schedule.actions import Schedule, Shape, place_stages
from armillary.parallel.schedule.check import check
from armillary.parallel.schedule.simulator import Costs, even_costs
from armillary.parallel.schedule.stock import KNOWN, stock_schedule
from armillary.parallel.schedule.synthesis import SYNTHESISED, synthesise

SCHEDULES = (*KNOWN, SYNTHESISED)


def shape_of(name: str) -> Shape:
    """How a schedule lays the stages on the ranks. One made to measure is a V: turning round costs no hop, and the
    first and the last stage are on one rank, so that a matrix tied between embedding and head is there once."""
    return "v" if name == SYNTHESISED else KNOWN[name].shape


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
    per_rank = _stages_per_rank(name, stages_per_rank)
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


def _stages_per_rank(name: str, wanted: int) -> int:
    """`wanted`, or for 0 what is usual for the schedule.

    Raises:
        ValueError: if there is no such schedule, or it does not allow this number.
    """
    if name not in SCHEDULES:
        raise ValueError(f'plan.schedule = "{name}" is not a schedule; there are: {", ".join(SCHEDULES)}')
    usual, others = (1, True) if name == SYNTHESISED else (KNOWN[name].stages, KNOWN[name].other_stages)
    if wanted < 0:
        raise ValueError(f"plan.stages_per_rank = {wanted} must be at least 1; leave it out for the schedule's own")
    if wanted not in (0, usual) and not others:
        hint = ', or plan.schedule = "interleaved" for more' if name == "1f1b" else ""
        raise ValueError(
            f'plan.schedule = "{name}" has exactly {usual} stage{"s" if usual > 1 else ""} a rank, not '
            f"plan.stages_per_rank = {wanted}; leave that key out{hint}"
        )
    return wanted or usual
