"""Searches for a faster schedule: among policies, and by moving single actions on the critical path.

Both draw from a generator with a fixed seed and count evaluations, not seconds: equal inputs give equal schedules.
"""

import math
import random
from collections import deque
from dataclasses import replace
from itertools import product

from armillary.parallel.schedule.greedy import F, I, Orders, Piece, Policy, Problem, Score, W, dispatch

Inputs = list[list[list[float]]]
Run = tuple[Score, list[list[float]], Inputs]
"""Score; of each rank, when its actions begin; of F and I, stage and micro-batch, when the input is there."""
CLOSE = 1e-9
STEPS = (-2, -1, 1, 2)
REACHES = (1, 1, 1, 2, 3, 4, 6, 9)
"""How many places an action is moved by; mostly one."""


def _first_policies(problem: Problem) -> list[Policy]:
    num_stages, num_ranks, num = problem.num_stages, problem.num_ranks, problem.num
    per_rank = max(map(len, problem.stages))
    like_1f1b = tuple(max(1, min(num, num_ranks - rank)) for rank in problem.stage_ranks)
    to_the_end = tuple(max(1, min(num, num_stages - stage)) for stage in range(num_stages))
    none = (0.0,) * num_stages
    owed = [(num * per_rank,) * num_ranks, tuple(range(num_ranks)), (1,) * num_ranks]
    if not problem.split:
        owed = [(0,) * num_ranks]
    return [
        Policy(under_way, may_wait, none, (later,) * num_stages, patience)
        for under_way, may_wait, later, patience in product(
            ((num,) * num_stages, like_1f1b, to_the_end), owed, (-1e6, -1.0, 0.0, 1.0), (0.0, 0.5, 1.0)
        )
    ]


def _changed(policy: Policy, problem: Problem, draw: random.Random) -> Policy:
    """A policy near another one."""
    stage, rank = draw.randrange(problem.num_stages), draw.randrange(problem.num_ranks)
    step, shift, which = draw.choice(STEPS), draw.uniform(-1, 1), draw.random()

    def bounded(number: float, low: int) -> int:
        return int(max(low, min(problem.num * problem.num_stages, number + step)))

    if which < 0.3:
        return policy.with_at("under_way", stage, bounded(policy.under_way[stage], 1))
    if which < 0.4:
        return replace(policy, under_way=tuple(bounded(count, 1) for count in policy.under_way))
    if which < 0.65 and problem.split:
        if which < 0.6:
            return policy.with_at("owed", rank, bounded(policy.owed[rank], 0))
        return replace(policy, owed=tuple(bounded(count, 0) for count in policy.owed))
    if which < 0.75:
        return policy.with_at("forward_later", stage, policy.forward_later[stage] + shift)
    if which < 0.85:
        return policy.with_at("backward_later", stage, policy.backward_later[stage] + shift)
    if which < 0.93:
        return replace(policy, backward_later=tuple(later + shift for later in policy.backward_later))
    return replace(policy, patience=draw.choice((0.0, 0.3, 0.5, 0.8, 1.0)))


def search_policies(
    problem: Problem, evaluations: int, enough: float = 0.0, starts: int = 4
) -> list[tuple[Score, Orders]]:
    """Climbs from the best of the usual policies; returns where each climb ended, best first.

    Args:
        evaluations: policies tried in all climbs.
        enough: a makespan at which to stop, in periods.
    """
    draw = random.Random(0)
    ranked = sorted(((dispatch(problem, policy)[0], n, policy) for n, policy in enumerate(_first_policies(problem))))
    found = []
    for score, _, policy in ranked[:starts]:
        for _ in range(evaluations // starts):
            if score[0] <= enough:
                break
            other = policy
            for _ in range(draw.choice((1, 1, 2, 3))):
                other = _changed(other, problem, draw)
            if (reached := dispatch(problem, other)[0]) <= score:
                score, policy = reached, other
        found.append((score, dispatch(problem, policy)[1]))
        if score[0] <= enough:
            break
    return sorted(found, key=lambda end: end[0])


def evaluate(problem: Problem, orders: Orders) -> Run | None:
    """Runs orders on the virtual clock; None if ranks wait for each other for ever."""
    num_ranks = problem.num_ranks
    inputs: Inputs = [[[math.inf] * problem.num for _ in range(problem.num_stages)] for _ in (F, I)]
    inputs[F][0] = [0.0] * problem.num
    now = [0.0] * num_ranks
    starts: list[list[float]] = [[] for _ in range(num_ranks)]
    awake = deque(range(num_ranks))
    while awake:
        rank = awake.popleft()
        order, begun, time = orders[rank], starts[rank], now[rank]
        for kind, stage, micro_batch in order[len(begun) :]:
            if kind != W:
                there = inputs[kind][stage][micro_batch]
                if there == math.inf:
                    break
                time = max(time, there)
            begun.append(time)
            time += problem.seconds[kind][stage][micro_batch]
            to = stage + 1 if kind == F else stage - 1
            if kind == F and to == problem.num_stages:
                inputs[I][stage][micro_batch] = time
            elif kind != W and to >= 0:
                inputs[kind][to][micro_batch] = time + problem.hops[min(stage, to)]
                if problem.stage_ranks[to] != rank:
                    awake.append(problem.stage_ranks[to])
        now[rank] = time
    if any(len(begun) < len(order) for begun, order in zip(starts, orders, strict=True)):
        return None
    return (max(now), sum(now)), starts, inputs


def _critical_places(problem: Problem, orders: Orders, run: Run) -> list[tuple[int, int]]:
    """Along one longest path: rank and place of each action that the next one on its rank waits for, and for nothing
    else."""
    _, starts, inputs = run
    where = {piece: (rank, place) for rank, order in enumerate(orders) for place, piece in enumerate(order)}

    def end_of(rank: int) -> float:
        kind, stage, micro_batch = orders[rank][-1]
        return starts[rank][-1] + problem.seconds[kind][stage][micro_batch]

    rank = max(range(problem.num_ranks), key=end_of)
    place, places = len(orders[rank]) - 1, []
    while starts[rank][place] > CLOSE:
        kind, stage, micro_batch = orders[rank][place]
        if kind != W and inputs[kind][stage][micro_batch] >= starts[rank][place] - CLOSE:
            source: Piece = (F, stage - 1, micro_batch)
            if kind == I:
                last = stage == problem.num_stages - 1
                source = (F, stage, micro_batch) if last else (I, stage + 1, micro_batch)
            rank, place = where[source]
        else:
            place -= 1
            places.append((rank, place))
    return places


def _may_swap(before: Piece, after: Piece) -> bool:
    """Whether neighbours on a rank may change places: micro-batches stay in turn, and what needs the other stays."""
    if before[:2] == after[:2]:
        return False
    if before[2] != after[2]:
        return True
    kinds = before[0], after[0]
    if kinds == (I, W):
        return before[1] != after[1]
    if kinds == (I, I):
        return before[1] < after[1]
    if kinds == (F, F):
        return before[1] > after[1]
    return kinds == (W, I)


def _moved(order: list[Piece], place: int, reach: int, later: bool) -> list[Piece]:
    """An order with the action at `place` later, or the one behind it earlier, by at most `reach` places."""
    order = list(order)
    if later:
        piece, at = order[place], place
        while at + 1 < len(order) and at - place < reach and _may_swap(piece, order[at + 1]):
            order[at] = order[at + 1]
            at += 1
    else:
        piece, at = order[place + 1], place + 1
        while at > 0 and place + 1 - at < reach and _may_swap(order[at - 1], piece):
            order[at] = order[at - 1]
            at -= 1
    order[at] = piece
    return order


def improve(problem: Problem, orders: Orders, evaluations: int, enough: float = 0.0) -> tuple[Score, Orders]:
    """Moves actions on the critical path for as long as that does no harm.

    Args:
        orders: that keep the limits and can be followed to the end.
        enough: a makespan at which to stop, in periods.
    """
    draw = random.Random(0)
    run = evaluate(problem, orders)
    assert run is not None, "orders to improve cannot be followed"
    best, kept = run[0], orders
    places = _critical_places(problem, orders, run)
    for _ in range(evaluations):
        if not places or best[0] <= enough:
            break
        rank, place = draw.choice(places)
        order = _moved(orders[rank], place, draw.choice(REACHES), draw.random() < 0.5)
        if order == orders[rank] or not problem.fits(rank, order):
            continue
        other = [*orders[:rank], order, *orders[rank + 1 :]]
        reached = evaluate(problem, other)
        if reached is not None and reached[0][0] <= run[0][0] + CLOSE:
            run, orders = reached, other
            places = _critical_places(problem, orders, run)
            if run[0] < best:
                best, kept = run[0], orders
    return best, kept
