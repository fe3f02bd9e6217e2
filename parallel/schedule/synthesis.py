"""A schedule made to measure: for the costs of each stage, the hops and the memory of each rank.

Candidates are every known schedule of the cut that fits the memory, what the searches make of the best of them, and
what rules with searched numbers make (schedule/greedy.py). The fastest in the simulator is the answer, so that it is
never slower there than a known schedule. What it could at best have been is reported with it.

Sources: the problem and the idea of giving each rank its own number of waiting weight gradients are Zero Bubble's
(arXiv 2401.10241, section 3 and appendix); moves on the critical path are job-shop scheduling's (van Laarhoven, Aarts
and Lenstra, 1992).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from armillary.parallel.schedule.actions import Action, Kind, Schedule, place_stages
from armillary.parallel.schedule.bound import lower_bound
from armillary.parallel.schedule.check import check
from armillary.parallel.schedule.greedy import I, Orders, Problem, W
from armillary.parallel.schedule.search import improve, search_policies
from armillary.parallel.schedule.simulator import Costs, Simulation, simulate
from armillary.parallel.schedule.stock import KNOWN, stock_schedule

SYNTHESISED = "synthesised"
"""The name of a schedule made to measure."""
KINDS: tuple[Kind, Kind, Kind] = ("F", "I", "W")
ENOUGH = 1 + 1e-9
"""A makespan of so much times the bound is the bound: there is nothing left to find."""
MOST_PIECES = 400_000
"""Pieces of work that a search of policies places in all, where there are many; what keeps it to some seconds."""


@dataclass(frozen=True)
class Synthesis:
    """A schedule made to measure, and what is known about it."""

    schedule: Schedule
    simulation: Simulation
    bound: float
    """Seconds that no schedule of this cut can beat."""
    stock: dict[str, Simulation]
    """The known schedules of this cut, those that do not fit the memory among them."""
    fitting: tuple[str, ...]
    """Names of those that fit it."""

    @property
    def ratio(self) -> float:
        """To the bound; 1 is a proof that nothing is faster."""
        return self.simulation.makespan / self.bound

    @property
    def best_stock(self) -> float:
        """Seconds of the fastest known schedule that fits the memory; infinite if none does."""
        return min((self.stock[name].makespan for name in self.fitting), default=math.inf)


def stock_of_cut(stage_ranks: Sequence[int], num_micro_batches: int) -> list[Schedule]:
    """The known schedules whose stages lie like this."""
    num_ranks = max(stage_ranks) + 1
    per_rank = len(stage_ranks) // num_ranks
    return [
        stock_schedule(name, num_ranks, num_micro_batches, per_rank)
        for name, known in KNOWN.items()
        if (known.other_stages or known.stages == per_rank)
        and place_stages(num_ranks, per_rank, known.shape) == tuple(stage_ranks)
    ]


def synthesise(
    stage_ranks: Sequence[int],
    num_micro_batches: int,
    costs: Costs,
    limits: Sequence[float] | None = None,
    split: bool = True,
    effort: int = 400,
) -> Synthesis:
    """The fastest schedule found for a cut; equal inputs give equal schedules.

    Args:
        stage_ranks: the rank of each stage.
        costs: of each stage; transfers one at a time are not searched for, only counted in the end.
        limits: bytes of activations that each rank may hold; unlimited if left out.
        split: whether backwards may be split; torch.compile does not support it.
        effort: how many policies and moves are tried, less where schedules are long.

    Raises:
        ValueError: if a rank's limit has no room for one micro-batch of each of its stages.
    """
    num_ranks = max(stage_ranks) + 1
    allowed = tuple(limits) if limits is not None else (math.inf,) * num_ranks
    _refuse_too_little_memory(stage_ranks, costs, allowed)
    bound = lower_bound(stage_ranks, num_micro_batches, costs, allowed)
    stock = [s for s in stock_of_cut(stage_ranks, num_micro_batches) if split or not s.splits_backward]
    runs = [(schedule, simulate(schedule, costs)) for schedule in stock]
    fitting = [pair for pair in runs if _fits(pair[1], allowed)]
    seeds = [schedule for schedule, _ in sorted(fitting, key=lambda pair: pair[1].makespan)[:2]]
    candidates = list(fitting)
    for num_split in _numbers_split(num_micro_batches, num_ranks, costs) if split else (0,):
        if min((run.makespan for _, run in candidates), default=math.inf) <= bound * ENOUGH:
            break
        problem = Problem(stage_ranks, num_micro_batches, costs, allowed, num_split)
        made = [made for orders in _searched(problem, seeds, effort, bound) for made in _made(problem, orders)]
        tried = [(schedule, simulate(schedule, costs)) for schedule in made]
        candidates += [pair for pair in tried if _fits(pair[1], allowed)]
    chosen, simulation = min(candidates, key=_preference)
    check(chosen)
    return Synthesis(
        replace(chosen, name=SYNTHESISED),
        simulation,
        bound,
        {schedule.name: run for schedule, run in runs},
        tuple(schedule.name for schedule, _ in fitting),
    )


def _preference(pair: tuple[Schedule, Simulation]) -> tuple[float, float, int]:
    """The fastest; of those the one that holds the least; of those the one with the fewest actions."""
    schedule, run = pair
    return float(f"{run.makespan:.10g}"), max(run.peaks), sum(map(len, schedule.orders))


def _refuse_too_little_memory(stage_ranks: Sequence[int], costs: Costs, limits: Sequence[float]) -> None:
    for rank, limit in enumerate(limits):
        needed = sum(held for held, holder in zip(costs.held(), stage_ranks, strict=True) if holder == rank)
        if needed > limit:
            raise ValueError(
                f'plan.schedule = "synthesised": pipeline rank {rank} may hold {limit:.4g} bytes of activations, and '
                f"one micro-batch takes {needed:.4g}; raise optim.micro_batches, or set plan.recompute"
            )


def _fits(run: Simulation, limits: Sequence[float]) -> bool:
    return all(peak <= limit * (1 + 1e-9) for peak, limit in zip(run.peaks, limits, strict=True))


def _searched(problem: Problem, seeds: Sequence[Schedule], effort: int, bound: float) -> list[Orders]:
    pieces = 3 * problem.num * problem.num_stages
    evaluations = max(20, min(effort, MOST_PIECES // pieces))
    enough = bound / problem.period * ENOUGH
    climbed = search_policies(problem, evaluations, enough)
    found = [orders for _, orders in climbed]
    starts = [climbed[0][1], *(_orders_of(schedule) for schedule in seeds)]
    best = climbed[0][0][0]
    for orders in starts:
        if best > enough and all(problem.fits(rank, order) for rank, order in enumerate(orders)):
            score, better = improve(problem, orders, 2 * evaluations, enough)
            found.append(better)
            best = min(best, score[0])
    return found


def _orders_of(schedule: Schedule) -> Orders:
    return [
        [
            (KINDS.index(kind), leaf.stage, leaf.micro_batch)
            for action in order
            for leaf in action.leaves
            for kind in (KINDS[1:] if leaf.kind == "B" else (leaf.kind,))
        ]
        for order in schedule.orders
    ]


def _numbers_split(num: int, num_ranks: int, costs: Costs) -> list[int]:
    """How many of the last micro-batches' backwards to try to split.

    All, and where a full backward costs other than its parts, also none, and those with which the pipeline runs dry.
    """
    fewer = [count for count in (num_ranks, 2 * num_ranks) if count < num]
    return [num, 0, *fewer] if costs.backward else [num]


def _made(problem: Problem, orders: Orders) -> list[Schedule]:
    """The schedule that has these orders; and with each I that its W follows at once as one full backward, where no
    other stage waits for the I."""

    def action(kind: int, stage: int, micro_batch: int) -> Action | None:
        whole = micro_batch < problem.num_whole
        return None if whole and kind == W else Action(stage, "B" if whole and kind == I else KINDS[kind], micro_batch)

    made = [[done for piece in order if (done := action(*piece)) is not None] for order in orders]
    return [
        Schedule(SYNTHESISED, problem.num, problem.stage_ranks, tuple(map(tuple, of_ranks)))
        for of_ranks in (made, [_joined(order) for order in made])
    ]


def _joined(order: Sequence[Action]) -> list[Action]:
    joined: list[Action] = []
    for action in order:
        if action.kind == "W" and action.stage == 0 and joined and joined[-1] == action._replace(kind="I"):
            joined[-1] = action._replace(kind="B")
        else:
            joined.append(action)
    return joined
