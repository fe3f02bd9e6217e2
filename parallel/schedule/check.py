"""Whether a schedule computes everything once, in an order in which no rank waits for ever."""

from armillary.parallel.schedule.actions import Action, Schedule

Piece = tuple[str, int, int]
"""Kind (F, I or W), stage, micro-batch. A full backward is an I and a W."""


def pieces_of(action: Action) -> tuple[Piece, ...]:
    """What an action that is no overlap computes."""
    kinds = ("I", "W") if action.kind == "B" else (action.kind,)
    return tuple((kind, action.stage, action.micro_batch) for kind in kinds)


def needed_by(action: Action, num_stages: int) -> tuple[Piece, ...]:
    """What has to be computed before an action that is no overlap: by the stage beside it, and by its own."""
    kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
    if kind == "F":
        return (("F", stage - 1, micro_batch),) if stage > 0 else ()
    if kind == "W":
        return (("I", stage, micro_batch),)
    own = ("F", stage, micro_batch)
    return (own, ("I", stage + 1, micro_batch)) if stage < num_stages - 1 else (own,)


def check(schedule: Schedule) -> None:
    """Every stage's F, I and W of every micro-batch once, on the rank that holds the stage, micro-batches of a stage in
    order, and all of it in an order that can be followed to the end.

    Micro-batches in order: torch's runtime finds the loss of a micro-batch by counting the last stage's forwards.
    An order that can be followed by ranks that wait for inputs alone is enough for ranks whose sends wait for the
    receiver too: torch adds a send and its receive to both ranks' lists at the same moment of one such run of all
    ranks, so the transfers of every rank are a part of one common sequence, which blocking ranks can follow as well. A
    receive is never behind an action that waits for it: an overlap's parts must not wait for each other.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    _check_placement(schedule)
    _check_turns(schedule)
    _check_progress(schedule)


def _check_placement(schedule: Schedule) -> None:
    if set(schedule.stage_ranks) != set(range(schedule.num_ranks)):
        raise ValueError(f"schedule {schedule.name}: stages on ranks {sorted(set(schedule.stage_ranks))}, orders for"
                         f" {schedule.num_ranks}; every rank holds a stage")  # fmt: skip
    for rank, order in enumerate(schedule.orders):
        for action in order:
            for leaf in action.leaves:
                known = 0 <= leaf.stage < schedule.num_stages and leaf.kind in ("F", "I", "W", "B")
                if not known or schedule.stage_ranks[leaf.stage] != rank:
                    raise ValueError(f"schedule {schedule.name}: rank {rank} has {action}, which is not its stage's")
            if action.parts and [leaf.kind == "F" for leaf in action.leaves] != [True, False]:
                raise ValueError(f"schedule {schedule.name}: {action} overlaps others than a forward and a backward")


def _check_turns(schedule: Schedule) -> None:
    seen: dict[tuple[str, int], int] = {}
    for leaf in schedule.leaves():
        for kind, stage, micro_batch in pieces_of(leaf):
            due = seen.get((kind, stage), 0)
            if micro_batch != due:
                raise ValueError(
                    f"schedule {schedule.name}: {leaf} where micro-batch {due} is due; each is computed once, in order"
                )
            seen[kind, stage] = due + 1
    for kind in "FIW":
        for stage in range(schedule.num_stages):
            if (count := seen.get((kind, stage), 0)) != schedule.num_micro_batches:
                raise ValueError(
                    f"schedule {schedule.name}: {kind} of stage {stage} for {count} of "
                    f"{schedule.num_micro_batches} micro-batches"
                )


def _check_progress(schedule: Schedule) -> None:
    done: set[Piece] = set()
    place = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while place[rank] < len(order):
                leaves = order[place[rank]].leaves
                if not all(need in done for leaf in leaves for need in needed_by(leaf, schedule.num_stages)):
                    break
                done.update(piece for leaf in leaves for piece in pieces_of(leaf))
                place[rank] += 1
                moved = True
    stuck = [str(order[at]) for order, at in zip(schedule.orders, place, strict=True) if at < len(order)]
    if stuck:
        raise ValueError(f"schedule {schedule.name}: ranks wait for each other for ever at {', '.join(stuck)}")
