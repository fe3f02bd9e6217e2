"""Which layers each pipeline stage holds: by cost, by the speed of the rank, within its memory, or as a user says.

Numbers in, numbers out: what a layer costs (operations, seconds, bytes) is for the caller to say. A split is a count
of layers for each stage, in the model's order; the first stage also holds the embedding, the last one the head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

Counts = tuple[int, ...]
Score = tuple[float, float, float]
ENUMERABLE = 20_000
"""Splits that are tried one by one rather than searched among."""


@dataclass(frozen=True)
class LayerCosts:
    """Of each layer, the embedding, and the head with the loss, in one unit; for a whole step or one micro-batch."""

    layers: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0

    def of_stages(self, counts: Sequence[int]) -> list[float]:
        """The cost of each stage of a split."""
        before = list(accumulate(self.layers, initial=0.0))
        ends = list(accumulate(counts, initial=0))
        costs = [before[end] - before[start] for start, end in pairwise(ends)]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs

    def of_ranks(self, counts: Sequence[int], stage_ranks: Sequence[int]) -> list[float]:
        """The cost of each rank: of all stages it holds."""
        costs = [0.0] * (max(stage_ranks) + 1)
        for cost, rank in zip(self.of_stages(counts), stage_ranks, strict=True):
            costs[rank] += cost
        return costs


@dataclass(frozen=True)
class _Problem:
    work: LayerCosts
    stage_ranks: tuple[int, ...]
    speeds: tuple[float, ...]
    memory: LayerCosts
    limits: tuple[float, ...]

    def score(self, counts: Sequence[int]) -> Score:
        """Less is better: bytes over the limits, then the slowest rank's time, then how uneven the ranks are."""
        held = self.memory.of_ranks(counts, self.stage_ranks)
        times = [c / s for c, s in zip(self.work.of_ranks(counts, self.stage_ranks), self.speeds, strict=True)]
        over = sum(max(0.0, h - limit) for h, limit in zip(held, self.limits, strict=True))
        # Rounded, so that the order of a sum never decides.
        return (over, float(f"{max(times):.12g}"), float(f"{sum(time * time for time in times):.12g}"))


def split_layers(
    work: LayerCosts,
    stage_ranks: Sequence[int],
    speeds: Sequence[float] | None = None,
    memory: LayerCosts | None = None,
    limits: Sequence[float] | None = None,
) -> Counts:
    """Layers of each stage, at least one, so that the slowest rank's time is the least there can be; then as even as
    can be.

    Exact with one stage a rank (dynamic programme), with layers that are all alike (greedy; costs grow by the same
    step each), and where all splits can be tried; otherwise a local search that moves one layer at a time.

    Args:
        work: cost of each layer, of the embedding and of the head.
        stage_ranks: rank of each stage, see `schedule/actions.py`.
        speeds: relative, of each rank; equal if left out.
        memory: bytes of each layer, of the embedding and of the head.
        limits: bytes that each rank may hold; needs `memory`.

    Raises:
        ValueError: if there are more stages than layers, a speed is not positive, or nothing fits the limits.
    """
    num_layers, num_stages, num_ranks = len(work.layers), len(stage_ranks), max(stage_ranks) + 1
    if num_stages > num_layers:
        raise ValueError(
            f"{num_stages} pipeline stages (plan.pp times stages a rank) are more than model.num_layers = {num_layers} "
            f"can fill; use at most {num_layers}"
        )
    rates = tuple(speeds) if speeds is not None else (1.0,) * num_ranks
    if len(rates) != num_ranks or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"speeds of the pipeline's ranks {rates}: give {num_ranks} positive numbers, one a rank")
    no_bytes = LayerCosts((0.0,) * num_layers)
    problem = _Problem(
        work,
        tuple(stage_ranks),
        rates,
        memory or no_bytes,
        tuple(limits) if limits is not None else (math.inf,) * num_ranks,
    )
    counts = _solve(problem)
    if counts is None or problem.score(counts)[0] > 0:
        raise ValueError(
            f"no split of {num_layers} layers over plan.pp = {num_ranks} ranks fits their memory; use more "
            "ranks, smaller optim.micro_batches, or plan.recompute"
        )
    return counts


def given_layers(counts: Sequence[int], num_layers: int, num_stages: int) -> Counts:
    """The split that a user has written as `plan.layers`, checked.

    Raises:
        ValueError: if it is not one number for each stage, does not add up, or leaves a stage between the first and
            the last without a layer.
    """
    where = f"plan.layers = {list(counts)}"
    if len(counts) != num_stages:
        raise ValueError(f"{where} has {len(counts)} numbers; give one for each of the {num_stages} pipeline stages")
    if sum(counts) != num_layers:
        raise ValueError(f"{where} adds up to {sum(counts)}; it must be model.num_layers = {num_layers}")
    if min(counts) < 0 or (num_stages > 2 and min(counts[1:-1]) < 1):
        raise ValueError(f"{where}: only the first and the last stage may have 0 layers, for embedding and head")
    return tuple(counts)


def _solve(problem: _Problem) -> Counts | None:
    num_layers, num_stages = len(problem.work.layers), len(problem.stage_ranks)
    if len(set(problem.stage_ranks)) == num_stages:
        return _exact(problem)
    alike = len(set(problem.work.layers)) == 1 and len(set(problem.memory.layers)) == 1
    if alike:
        return _dealt(problem)
    if math.comb(num_layers - 1, num_stages - 1) <= ENUMERABLE:
        return min(_all_splits(num_layers, num_stages), key=problem.score)
    evenly = tuple(num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages))
    return _improved(problem, _dealt(problem) or evenly)


def _all_splits(num_layers: int, num_stages: int) -> Iterator[Counts]:
    for edges in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(end - start for start, end in pairwise((0, *edges, num_layers)))


def _exact(problem: _Problem) -> Counts | None:
    """One stage a rank: first the least possible slowest time, then the least sum of squares that keeps it."""
    slowest = _best_path(problem, max, lambda time: time)
    if slowest is None:
        return None
    bound = slowest[0] * (1 + 1e-12)
    evenest = _best_path(problem, lambda a, b: a + b, lambda time: time * time if time <= bound else math.inf)
    return (evenest or slowest)[1]


def _best_path(
    problem: _Problem, join: Callable[[float, float], float], value: Callable[[float], float]
) -> tuple[float, Counts] | None:
    """The split whose stages' values, joined, are least, and what they come to; None if none is finite."""
    num_layers, num_stages = len(problem.work.layers), len(problem.stage_ranks)
    work = list(accumulate(problem.work.layers, initial=0.0))
    held = list(accumulate(problem.memory.layers, initial=0.0))
    best: dict[int, tuple[float, Counts]] = {0: (0.0, ())}
    for stage, rank in enumerate(problem.stage_ranks):
        first, last = stage == 0, stage == num_stages - 1
        work_more = problem.work.embedding * first + problem.work.head * last
        held_more = problem.memory.embedding * first + problem.memory.head * last
        reached: dict[int, tuple[float, Counts]] = {}
        for start, (so_far, counts) in best.items():
            for end in range(max(start + 1, num_layers if last else 0), num_layers + 1):
                if held[end] - held[start] + held_more > problem.limits[rank]:
                    continue
                cost = join(so_far, value((work[end] - work[start] + work_more) / problem.speeds[rank]))
                if cost < reached.get(end, (math.inf,))[0]:
                    reached[end] = (cost, (*counts, end - start))
        best = reached
    return best.get(num_layers)


def _dealt(problem: _Problem) -> Counts | None:
    """Layers dealt out one by one, each to the rank whose time it makes the least long. Exact if layers are alike.

    A rank's layers go to that of its stages which costs the least so far.
    """
    num_layers, num_ranks = len(problem.work.layers), len(problem.speeds)
    layer, layer_bytes = sum(problem.work.layers) / num_layers, sum(problem.memory.layers) / num_layers
    alike = (layer,) * num_layers, (layer_bytes,) * num_layers
    work = LayerCosts(alike[0], problem.work.embedding, problem.work.head)
    memory = LayerCosts(alike[1], problem.memory.embedding, problem.memory.head)
    counts = [1] * len(problem.stage_ranks)
    stages, times = work.of_stages(counts), work.of_ranks(counts, problem.stage_ranks)
    held = memory.of_ranks(counts, problem.stage_ranks)
    for _ in range(num_layers - sum(counts)):
        open_ranks = [r for r in range(num_ranks) if held[r] + layer_bytes <= problem.limits[r]]
        if not open_ranks:
            return None
        rank = min(open_ranks, key=lambda r: (times[r] + layer) / problem.speeds[r])
        stage = min((s for s, r in enumerate(problem.stage_ranks) if r == rank), key=lambda s: stages[s])
        counts[stage] += 1
        stages[stage] += layer
        times[rank] += layer
        held[rank] += layer_bytes
    return tuple(counts)


def _improved(problem: _Problem, counts: Counts) -> Counts:
    """Moves one layer from a stage to another, all between them moving along, for as long as that helps."""
    best, score = counts, problem.score(counts)
    improved = True
    while improved:
        improved = False
        for source in range(len(counts)):
            for target in range(len(counts)):
                if source == target or best[source] == 1:
                    continue
                moved = tuple(c - (i == source) + (i == target) for i, c in enumerate(best))
                if (other := problem.score(moved)) < score:
                    best, score, improved = moved, other, True
    return best
