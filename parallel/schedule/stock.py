"""The known pipeline schedules, for any number of micro-batches.

Sources: GPipe (arXiv 1811.06965), 1F1B (PipeDream-Flush, 2006.09503), interleaved 1F1B (Megatron, 2104.04473), ZB1P
and ZBV (Zero Bubble, 2401.10241 and 2405.15362), DualPipeV (DeepSeek-V3, 2412.19437, cut in half). Where torch's
classes accept the numbers, the orders are theirs, action by action; tests hold the two against each other. Where they
do not (micro-batches that are no multiple of the rounds, fewer than ranks or stages), the order for the next number
that fits is made, and the surplus is left out.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from armillary.parallel.schedule.actions import Action, Kind, Schedule, Shape, overlap, place_stages, without_padding

Order = list[Action]


class _Turns:
    """The next micro-batch of each stage and kind, as every schedule here takes them in turn."""

    def __init__(self) -> None:
        self.order: Order = []
        self.count: dict[tuple[int, str], int] = {}
        self.owed: deque[Action] = deque()
        """Weight gradients of the backwards that were split, oldest first."""

    def take(self, stage: int, kind: Kind) -> Action:
        counted = (stage, "I" if kind == "B" else kind)
        micro_batch = self.count.get(counted, 0)
        self.count[counted] = micro_batch + 1
        if kind == "I":
            self.owed.append(Action(stage, "W", micro_batch))
        return Action(stage, kind, micro_batch)

    def add(self, stage: int, kind: Kind) -> None:
        self.order.append(self.take(stage, kind))

    def add_owed(self) -> None:
        if self.owed:
            self.order.append(self.owed.popleft())


def _gpipe(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    forward = [Action(stage, "F", i) for stage in stages for i in range(num)]
    return forward + [Action(stage, "B", i) for stage in reversed(stages) for i in range(num)]


def _one_forward_one_backward(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    warm = min(num_ranks - 1 - rank, num)
    order = [Action(stages[0], "F", i) for i in range(warm)]
    for i in range(num - warm):
        order += [Action(stages[0], "F", warm + i), Action(stages[0], "B", i)]
    return order + [Action(stages[0], "B", i) for i in range(num - warm, num)]


def _rounds(num_ranks: int, num: int) -> int:
    return max(1, num // num_ranks)


def _whole_rounds(num_ranks: int, num: int) -> int:
    """The least number of micro-batches, from `num` on, that its rounds divide."""
    while num % _rounds(num_ranks, num):
        num += 1
    return num


def _interleaved(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    return _looped(num_ranks, rank, num, stages, 2 * (num_ranks - 1 - rank), None)


def _zero_bubble(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    return _looped(num_ranks, rank, num, stages, num_ranks - 1 - rank, rank)


def _looped(num_ranks: int, rank: int, num: int, stages: tuple[int, ...], lead: int, defer: int | None) -> Order:
    """Rounds of micro-batches through all stages of a rank; `lead` more forwards than the last rank before the first
    backward. With `defer`, backwards are split, and weight gradients begin after that many backwards."""
    size = num // _rounds(num_ranks, num)
    total = num * len(stages)
    warm = min((len(stages) - 1) * size + lead, total)
    turns = _Turns()
    for step in range(total + warm):
        if step < total:
            turns.add(stages[step // size % len(stages)], "F")
        if (back := step - warm) >= 0:
            turns.add(stages[-1 - back // size % len(stages)], "B" if defer is None else "I")
            if defer is not None and back >= defer:
                turns.add_owed()
    return turns.order + list(turns.owed)


def _zbv(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    down, up = stages
    turns = _Turns()

    def split(stage: int) -> None:
        turns.add(stage, "I")
        turns.order.append(turns.owed.pop())

    for _ in range(2 * (num_ranks - rank) - 1):
        turns.add(down, "F")
    for _ in range(rank):
        turns.add(up, "F")
        turns.add(down, "F")
    for _ in range(num_ranks - rank):
        turns.add(up, "F")
        split(up)
    while turns.count[up, "F"] < num:
        if turns.count[down, "F"] < num:
            turns.add(down, "F")
        split(down)
        turns.add(up, "F")
        split(up)
    for _ in range(rank):
        turns.add(down, "I")
        turns.add(up, "I")
    late = deque(action for action in turns.owed if action.stage == up)
    turns.owed = deque(action for action in turns.owed if action.stage == down)
    for _ in range(num_ranks - rank):
        turns.add(down, "I")
        turns.add_owed()
    return turns.order + list(late) + list(turns.owed)


def _dualpipev(num_ranks: int, rank: int, num: int, stages: tuple[int, ...]) -> Order:
    down, up = stages
    after = num_ranks - 1 - rank
    turns = _Turns()

    def pair(forward: int, backward: int) -> None:
        turns.order.append(overlap(turns.take(forward, "F"), turns.take(backward, "B")))

    for _ in range(2 * after):
        turns.add(down, "F")
    for _ in range(rank + 1):
        turns.add(down, "F")
        turns.add(up, "F")
    for _ in range(after):
        turns.add(up, "I")
        turns.add_owed()
        turns.add(up, "F")
    for i in range(num - 2 * num_ranks + rank + 1):
        if i == 0 and after == 0:
            turns.add(down, "F")
            turns.add(up, "B")
        else:
            pair(down, up)
        pair(up, down)
    for _ in range(after):
        turns.add(up, "B")
        pair(up, down)
    # The second half of the last backwards is split; on odd ranks from the upper stage on, on even ones from the lower.
    half = (rank + 1) // 2
    for i in range(rank + 1):
        turns.add(up, "I" if i > half or (i == half and rank % 2) else "B")
        turns.add(down, "I" if i >= half else "B")
    for _ in range(after):
        turns.add_owed()
        turns.add(down, "I")
    return turns.order + list(turns.owed)


@dataclass(frozen=True)
class Known:
    """A known schedule, and the numbers that it has."""

    order: Callable[[int, int, int, tuple[int, ...]], Order]
    """Of the number of ranks, a rank, the number of micro-batches and the rank's stages."""
    stages: int = 1
    """Stages a rank where no number is given."""
    other_stages: bool = True
    """Whether there may be another number of them."""
    shape: Shape = "loop"
    made_for: Callable[[int, int], int] = lambda num_ranks, num: num
    """For so many ranks and micro-batches: the number of micro-batches that an order is made for."""


KNOWN = {
    "gpipe": Known(_gpipe),
    "1f1b": Known(_one_forward_one_backward, other_stages=False),
    "interleaved": Known(_interleaved, stages=2, made_for=_whole_rounds),
    "zb1p": Known(_zero_bubble, made_for=_whole_rounds),
    "zbv": Known(_zbv, 2, False, "v", lambda num_ranks, num: max(num, 2 * num_ranks - 1)),
    "dualpipev": Known(_dualpipev, 2, False, "v", lambda num_ranks, num: max(num, 2 * num_ranks)),
}


def stock_schedule(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> Schedule:
    """The schedule of `KNOWN` that has this name, for a number of stages that it allows."""
    known = KNOWN[name]
    num = known.made_for(num_ranks, num_micro_batches)
    stage_ranks = place_stages(num_ranks, stages_per_rank, known.shape)
    orders = []
    for rank in range(num_ranks):
        stages = tuple(stage for stage, holder in enumerate(stage_ranks) if holder == rank)
        orders.append(known.order(num_ranks, rank, num, stages))
    return Schedule(name, num_micro_batches, stage_ranks, without_padding(orders, num_micro_batches))
