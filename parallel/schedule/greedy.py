"""A schedule made by rules: whenever a rank is free it takes the most urgent piece of work that is there.

Urgent is what is due first. In a pipeline that never waits, stage s takes micro-batch b one period (the busiest rank's
work for one micro-batch) after micro-batch b - 1; a piece is due when it could then be there. Weight gradients fill
the gaps. A `Policy` shifts all this, and limits how many micro-batches are under way; a search (schedule/search.py)
finds a good one.

No rank ever waits for memory for ever: a forward is taken only if room for one micro-batch of each later stage of its
rank is left, so the oldest micro-batch can always go on, and when it is done it frees what it held.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from armillary.parallel.schedule.simulator import Costs

F, I, W = range(3)  # noqa: E741 (the field's names)
Piece = tuple[int, int, int]
"""F, I or W; stage; micro-batch."""
Orders = list[list[Piece]]
Score = tuple[float, float]
"""Makespan, and the sum of the times at which the ranks are done; in periods. Less is better."""
NEVER: Score = (math.inf, math.inf)


class Problem:
    """The numbers of one synthesis, in units of the period, so that a tolerance is the same for all."""

    def __init__(self, stage_ranks: Sequence[int], num: int, costs: Costs, limits: Sequence[float], split: int) -> None:
        """Backwards of the last `split` micro-batches are split. One that is not is an I, and its W takes no time."""
        self.stage_ranks, self.num, self.limits, self.split = tuple(stage_ranks), num, tuple(limits), split
        self.num_whole = num - split
        self.num_stages, self.num_ranks = len(stage_ranks), max(stage_ranks) + 1
        self.stages = [[s for s, r in enumerate(stage_ranks) if r == rank] for rank in range(self.num_ranks)]
        whole, split_up = (costs.of("F"), costs.of("B")), (costs.of("F"), costs.of("I"), costs.of("W"))
        shorter = [min(b, i + w) for b, i, w in zip(whole[I], split_up[I], split_up[W], strict=True)]
        self.period = max(sum(whole[F][s] + shorter[s] for s in stages) for stages in self.stages) or 1.0
        parts = [
            *((*whole, (0.0,) * self.num_stages) for _ in range(self.num_whole)),
            *(split_up for _ in range(split)),
        ]
        # Of each kind, stage and micro-batch.
        self.seconds = [
            [[part[kind][s] / self.period for part in parts] for s in range(self.num_stages)] for kind in (F, I, W)
        ]
        self.hops = [hop / self.period for hop in costs.hops_between(self.stage_ranks)]
        self.held = costs.held()
        self.due = self._due()
        self.room = [sum(self.held[s] for s in self.stages[r] if s > stage) for stage, r in enumerate(stage_ranks)]

    def _due(self) -> tuple[list[float], list[float]]:
        """When each stage can have the first micro-batch's forward, and its backward."""
        forward, back = [0.0], [0.0] * self.num_stages
        for s, hop in enumerate(self.hops):
            forward.append(forward[s] + self.seconds[F][s][0] + hop)
        back[-1] = forward[-1] + self.seconds[F][-1][0]
        for s in reversed(range(self.num_stages - 1)):
            back[s] = back[s + 1] + self.seconds[I][s + 1][0] + self.hops[s]
        return forward, back

    def fits(self, rank: int, order: Sequence[Piece]) -> bool:
        """Whether a rank's order keeps its limit."""
        held, limit = 0.0, self.limits[rank] * (1 + 1e-12)
        for kind, stage, _ in order:
            held += self.held[stage] * (kind == F) - self.held[stage] * (kind == W)
            if held > limit:
                return False
        return True


@dataclass(frozen=True)
class Policy:
    """What is urgent, and how much may be under way."""

    under_way: tuple[int, ...]
    """Of each stage: micro-batches between their F and their I, at most; at least 1."""
    owed: tuple[int, ...]
    """Of each rank: weight gradients that may wait; one more, and the oldest goes first."""
    forward_later: tuple[float, ...]
    """Of each stage: periods by which its forwards are less urgent."""
    backward_later: tuple[float, ...]
    """The same of its backwards."""
    patience: float
    """A weight gradient is begun only if the next forward or backward will wait at most this share of it for its end.
    0 to 1."""

    def with_at(self, name: str, index: int, value: float) -> "Policy":
        """The same with another number of one stage or rank."""
        old = getattr(self, name)
        changes: dict[str, Any] = {name: (*old[:index], value, *old[index + 1 :])}
        return replace(self, **changes)


class _Board:
    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.policy = problem, policy
        num_stages, num_ranks, num = problem.num_stages, problem.num_ranks, problem.num
        # Of each kind and stage: the next micro-batch, and when each one's input is there.
        self.next = [[0] * num_stages for _ in range(3)]
        self.there = [[[math.inf] * num for _ in range(num_stages)] for _ in range(2)]
        self.there[F][0] = [0.0] * num
        later = (policy.forward_later, policy.backward_later)
        self.due = [[a + b for a, b in zip(problem.due[kind], later[kind], strict=True)] for kind in (F, I)]
        self.held, self.owed, self.free = [0.0] * num_ranks, [0] * num_ranks, [0.0] * num_ranks
        self.orders: Orders = [[] for _ in range(num_ranks)]
        self.events = [(0.0, rank) for rank in range(num_ranks)]

    def choose(self, rank: int, now: float) -> tuple[Piece | None, float]:
        """What a free rank begins now, if anything; and when, as far as is known, there will be more to choose from."""
        problem, policy = self.problem, self.policy
        best, best_due, soon = None, math.inf, math.inf
        filler, filler_due = None, math.inf
        room = problem.limits[rank] * (1 + 1e-12) - self.held[rank]
        for stage in problem.stages[rank]:
            forward, back, weight = self.next[F][stage], self.next[I][stage], self.next[W][stage]
            free = forward - back < policy.under_way[stage] and problem.held[stage] + problem.room[stage] <= room
            for kind, micro_batch, allowed in ((F, forward, forward < problem.num and free), (I, back, back < forward)):
                if allowed:
                    there = self.there[kind][stage][micro_batch]
                    due = micro_batch + self.due[kind][stage]
                    if there > now:
                        soon = min(soon, there)
                    elif due < best_due:
                        best, best_due = (kind, stage, micro_batch), due
            if weight < back and weight + problem.due[I][stage] < filler_due:
                filler, filler_due = (W, stage, weight), weight + problem.due[I][stage]
        if filler is not None:
            seconds = problem.seconds[W][filler[1]][filler[2]]
            if self.owed[rank] > policy.owed[rank]:
                return filler, soon
            if best is None and now + seconds - soon <= policy.patience * seconds:
                return filler, soon
        return best, soon

    def begin(self, rank: int, now: float, piece: Piece) -> None:
        kind, stage, micro_batch = piece
        problem = self.problem
        self.orders[rank].append(piece)
        self.next[kind][stage] += 1
        end = self.free[rank] = now + problem.seconds[kind][stage][micro_batch]
        heapq.heappush(self.events, (end, rank))
        self.held[rank] += problem.held[stage] * (kind == F) - problem.held[stage] * (kind == W)
        self.owed[rank] += (kind == I) - (kind == W)
        to = stage + 1 if kind == F else stage - 1
        if kind == F and to == problem.num_stages:
            self.there[I][stage][micro_batch] = end
        elif kind != W and to >= 0:
            receiver = problem.stage_ranks[to]
            there = self.there[kind][to][micro_batch] = end + problem.hops[min(stage, to)]
            heapq.heappush(self.events, (max(there, self.free[receiver]), receiver))
        if kind == I and micro_batch < problem.num_whole:
            self.begin(rank, end, (W, stage, micro_batch))


def dispatch(problem: Problem, policy: Policy) -> tuple[Score, Orders]:
    """The orders that a policy makes.

    Raises:
        ValueError: if a rank's limit has no room for one micro-batch of each of its stages.
    """
    board = _Board(problem, policy)
    while board.events:
        now, rank = heapq.heappop(board.events)
        if now < board.free[rank]:
            continue
        piece, soon = board.choose(rank, now)
        if piece is not None:
            board.begin(rank, now, piece)
        elif soon < math.inf:
            heapq.heappush(board.events, (soon, rank))
    if sum(map(len, board.orders)) < 3 * problem.num * problem.num_stages:
        raise ValueError("a pipeline rank has no room for one micro-batch of each of its stages")
    return (max(board.free), sum(board.free)), board.orders
