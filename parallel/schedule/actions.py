"""What a pipeline schedule is, as data: which rank computes which stage of which micro-batch, in which order.

Actions print as torch's pipeline runtime writes its own, so that `_Action.from_str(str(action))` hands one over:
`2F0` forward of stage 2 for micro-batch 0, `2I0` backward to its input, `2W0` to its weights, `2B0` both at once,
`(0F5;1B3)OVERLAP_F_B` two that may overlap. Imports no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "I", "W", "B", "OVERLAP_F_B"]
Shape = Literal["loop", "v"]


class Action(NamedTuple):
    """One piece of work of one rank."""

    stage: int
    """-1 for an overlap."""
    kind: Kind
    micro_batch: int
    """-1 for an overlap."""
    parts: tuple["Action", ...] = ()
    """Of an overlap: a forward and a backward of unlike micro-batches, neither of which waits for the other."""

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @property
    def leaves(self) -> tuple["Action", ...]:
        """The actions that compute: an overlap's parts, or the action itself."""
        return self.parts or (self,)


def overlap(forward: Action, backward: Action) -> Action:
    return Action(-1, "OVERLAP_F_B", -1, (forward, backward))


@dataclass(frozen=True)
class Schedule:
    """The order in which each pipeline rank computes."""

    name: str
    num_micro_batches: int
    stage_ranks: tuple[int, ...]
    """Of each stage, the rank that holds it."""
    orders: tuple[tuple[Action, ...], ...]
    """Of each rank, its actions in order."""

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that a rank holds, in the model's order."""
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == rank)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether any backward pass is computed in two parts, which torch.compile does not support."""
        return any(leaf.kind == "I" for leaf in self.leaves())

    @cached_property
    def overlaps(self) -> bool:
        return any(action.parts for order in self.orders for action in order)

    def leaves(self) -> Iterator[Action]:
        return (leaf for order in self.orders for action in order for leaf in action.leaves)

    def flat(self) -> "Schedule":
        """The same with each overlap as two actions, one after the other.

        torch's runtime computes an overlap one part after the other unless a function is registered for it, and sends
        the results of both only then; taken apart, the first result leaves sooner.
        """
        return replace(self, orders=tuple(tuple(leaf for a in order for leaf in a.leaves) for order in self.orders))

    def lines(self) -> dict[int, list[str]]:
        """Of each rank, its actions in torch's notation."""
        return {rank: [str(action) for action in order] for rank, order in enumerate(self.orders)}


def place_stages(num_ranks: int, stages_per_rank: int, shape: Shape = "loop") -> tuple[int, ...]:
    """The rank of each stage: `loop` starts each round at rank 0; `v` turns round at the last rank and at the first.

    >>> place_stages(3, 2, "loop"), place_stages(3, 2, "v")
    ((0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0))
    """
    out = tuple(range(num_ranks))
    back = out[::-1] if shape == "v" else out
    return tuple(rank for turn in range(stages_per_rank) for rank in (back if turn % 2 else out))


def without_padding(orders: Iterable[Iterable[Action]], num_micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """Orders made for more micro-batches than there are, without the surplus.

    Micro-batches never wait for each other except for their turn, so what is left is a schedule.
    """

    def kept(action: Action) -> tuple[Action, ...]:
        leaves = tuple(leaf for leaf in action.leaves if leaf.micro_batch < num_micro_batches)
        return (action,) if len(leaves) == len(action.leaves) else leaves

    return tuple(tuple(left for action in order for left in kept(action)) for order in orders)
