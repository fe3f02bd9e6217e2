"""How long a pipeline schedule takes, where its ranks wait, and what they hold, from the costs of each stage.

Event-driven, on one virtual clock: a rank computes its actions in order, each as soon as its input is there. Transfers
between ranks take time but no rank's time; a stage beside its neighbour on one rank hands over at once.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from armillary.parallel.schedule.actions import Action, Schedule


@dataclass(frozen=True)
class Costs:
    """Seconds (any unit, as long as it is one) of each stage for one micro-batch, on the rank that holds it."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    """Of I; with recompute, including the forward that is computed again."""
    backward_weight: tuple[float, ...]
    backward: tuple[float, ...] = ()
    """Of B, where that is not the sum of I and W."""
    hops: tuple[float, ...] = ()
    """From each stage to the next, and back; counted where their ranks are two."""
    activations: tuple[float, ...] = ()
    """Bytes that a stage holds for a micro-batch, from its F to its W or B; 1 if left out."""
    one_at_a_time: bool = False
    """Whether transfers from one rank to another wait for each other."""
    hidden: float = 0.0
    """Share of the shorter part of an overlap that costs no time; with more than 0, both results are there at its end.
    0 is a forward and then a backward."""

    @property
    def num_stages(self) -> int:
        return len(self.forward)

    def of(self, kind: str) -> tuple[float, ...]:
        """Of F, I, W or B, for each stage."""
        if kind == "B":
            pairs = zip(self.backward_input, self.backward_weight, strict=True)
            return self.backward or tuple(i + w for i, w in pairs)
        return {"F": self.forward, "I": self.backward_input, "W": self.backward_weight}[kind]

    def hops_between(self, stage_ranks: tuple[int, ...]) -> tuple[float, ...]:
        """From each stage to the next; 0 on one rank."""
        hops = self.hops or (0.0,) * (self.num_stages - 1)
        return tuple(hop if stage_ranks[i] != stage_ranks[i + 1] else 0.0 for i, hop in enumerate(hops))

    def held(self) -> tuple[float, ...]:
        return self.activations or (1.0,) * self.num_stages


def even_costs(
    num_stages: int, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0, hop: float = 0.0
) -> Costs:
    """The same for every stage."""
    return Costs(
        (forward,) * num_stages,
        (backward_input,) * num_stages,
        (backward_weight,) * num_stages,
        hops=(hop,) * (num_stages - 1),
    )


class Span(NamedTuple):
    """When an action that is no overlap was computed."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What became of a schedule."""

    makespan: float
    busy: tuple[float, ...]
    """Seconds that each rank computed."""
    peaks: tuple[float, ...]
    """The most bytes of activations that each rank held at once."""
    spans: tuple[tuple[Span, ...], ...] = field(repr=False)
    """Of each rank, in order."""

    @property
    def bubble(self) -> float:
        """Of all ranks together, the share of the time in which they did not compute."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))


class _Clock:
    """The state of one simulation."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        num_ranks, num_stages, num = schedule.num_ranks, schedule.num_stages, schedule.num_micro_batches
        self.schedule, self.costs = schedule, costs
        self.hops = costs.hops_between(schedule.stage_ranks)
        self.seconds = {kind: costs.of(kind) for kind in "FIWB"}
        self.held = costs.held()
        # When the input of a stage's forward or backward of each micro-batch is on its rank; None: not yet known.
        self.inputs: dict[str, list[list[float | None]]] = {
            "F": [[0.0 if s == 0 else None] * num for s in range(num_stages)],
            "I": [[0.0 if s == num_stages - 1 else None] * num for s in range(num_stages)],
        }
        self.inputs["B"] = self.inputs["I"]
        self.links: dict[tuple[int, int], float] = {}
        self.now, self.busy = [0.0] * num_ranks, [0.0] * num_ranks
        self.holds, self.peaks = [0.0] * num_ranks, [0.0] * num_ranks
        self.spans: list[list[Span]] = [[] for _ in range(num_ranks)]

    def try_action(self, rank: int, action: Action) -> Iterator[int] | None:
        """Computes an action, and returns the ranks that it sends to; None if an input is not there yet."""
        start = self.now[rank]
        for leaf in action.leaves:
            if leaf.kind != "W":
                there = self.inputs[leaf.kind][leaf.stage][leaf.micro_batch]
                if there is None:
                    return None
                start = max(start, there)
        if action.parts and self.costs.hidden > 0:
            parts = [self.seconds[leaf.kind][leaf.stage] for leaf in action.parts]
            end = start + sum(parts) - self.costs.hidden * min(parts)
            spans = [Span(leaf, start, end) for leaf in action.parts]
            self.busy[rank] += end - start
        else:
            spans, end = [], start
            for leaf in action.leaves:
                seconds = self.seconds[leaf.kind][leaf.stage]
                spans.append(Span(leaf, end, end + seconds))
                self.busy[rank] += seconds
                end += seconds
        self.now[rank] = end
        self.spans[rank] += spans
        return (to for span in spans if (to := self._finish(rank, span)) is not None)

    def _finish(self, rank: int, span: Span) -> int | None:
        """Counts what a rank holds after a span, and sends its result; returns to whom."""
        stage, kind, micro_batch = span.action.stage, span.action.kind, span.action.micro_batch
        if kind == "F":
            self.holds[rank] += self.held[stage]
            self.peaks[rank] = max(self.peaks[rank], self.holds[rank])
        elif kind != "I":
            self.holds[rank] -= self.held[stage]
        to = stage + 1 if kind == "F" else stage - 1
        if kind == "W" or not 0 <= to < self.schedule.num_stages:
            return None
        receiver = self.schedule.stage_ranks[to]
        leaves = span.end
        hop = self.hops[min(stage, to)]
        if self.costs.one_at_a_time and hop:
            leaves = max(leaves, self.links.get((rank, receiver), 0.0))
            self.links[rank, receiver] = leaves + hop
        self.inputs["F" if kind == "F" else "I"][to][micro_batch] = leaves + hop
        return receiver


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Runs a schedule on the virtual clock.

    Raises:
        ValueError: if the costs are of another number of stages, or ranks wait for each other for ever.
    """
    if costs.num_stages != schedule.num_stages:
        raise ValueError(f"costs of {costs.num_stages} stages for a schedule of {schedule.num_stages}")
    clock = _Clock(schedule, costs)
    place = [0] * schedule.num_ranks
    awake = deque(range(schedule.num_ranks))
    while awake:
        rank = awake.popleft()
        order = schedule.orders[rank]
        while place[rank] < len(order):
            reached = clock.try_action(rank, order[place[rank]])
            if reached is None:
                break
            awake.extend(reached)
            place[rank] += 1
    if any(at < len(order) for at, order in zip(place, schedule.orders, strict=True)):
        raise ValueError(f"schedule {schedule.name}: ranks wait for each other for ever")
    return Simulation(
        max(clock.now), tuple(clock.busy), tuple(clock.peaks), tuple(tuple(spans) for spans in clock.spans)
    )
