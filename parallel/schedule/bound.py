"""A time that no schedule of a cut can beat, from three facts.

A rank cannot begin before its first input is there, nor with backwards before the first micro-batch has been to the
last stage and back; until then it computes forwards only, as many as there are and as its memory holds. After its last
I, that micro-batch's gradient still has to go down to stage 0. And one micro-batch has to go there and back.
"""

import math
from collections.abc import Sequence

from armillary.parallel.schedule.simulator import Costs


def lower_bound(
    stage_ranks: Sequence[int], num_micro_batches: int, costs: Costs, limits: Sequence[float] | None = None
) -> float:
    """Seconds.

    Args:
        limits: bytes of activations that each rank may hold.
    """
    forward, full, first_back = costs.forward, costs.of("B"), []
    # A full backward may cost other than its two parts: the cheaper way is assumed, piece by piece.
    back = [min(i, b) for i, b in zip(costs.backward_input, full, strict=True)]
    split = [i + w for i, w in zip(costs.backward_input, costs.backward_weight, strict=True)]
    weight = [max(0.0, min(s, b) - i) for s, b, i in zip(split, full, back, strict=True)]
    hops = costs.hops_between(tuple(stage_ranks))
    head = [0.0]
    for stage, hop in enumerate(hops):
        head.append(head[stage] + forward[stage] + hop)
    reach = head[-1] + forward[-1]
    tail = [weight[0]]
    """Of each stage: what follows its last I."""
    for stage, hop in enumerate(hops):
        tail.append(tail[stage] + back[stage] + hop)
    for stage in reversed(range(len(forward))):
        first_back.append(reach)
        reach += back[stage] + (hops[stage - 1] if stage else 0.0)
    first_back.reverse()
    bounds = [reach + weight[0]]
    # What overlaps costs at least this share of the sum of both parts.
    share = 1 - costs.hidden / 2
    for rank in range(max(stage_ranks) + 1):
        stages = [stage for stage, holder in enumerate(stage_ranks) if holder == rank]
        begin, turn = head[stages[0]], first_back[stages[-1]]
        forwards = num_micro_batches * sum(forward[s] for s in stages)
        early = min(forwards, turn - begin, _forwards_held(stages, forward, costs.held(), limits, rank))
        # An overlap may end a forward's and a backward's work together; W is not needed before the end.
        chain = forwards + num_micro_batches * sum(back[s] for s in stages)
        work = chain + num_micro_batches * sum(weight[s] for s in stages)
        bounds.append(turn + share * (work - early))
        bounds.append(turn + share * (chain - early) + tail[stages[0]])
    return max(bounds)


def _forwards_held(
    stages: Sequence[int], forward: Sequence[float], held: Sequence[float], limits: Sequence[float] | None, rank: int
) -> float:
    """Seconds of forwards whose activations a rank can hold."""
    if limits is None or limits[rank] == math.inf or min(held[s] for s in stages) <= 0:
        return math.inf
    return limits[rank] * max(forward[s] / held[s] for s in stages)
