"""torch's own pipeline schedules, made without processes: what ours are held against."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.pipelining import schedules as theirs

from armillary.parallel.schedule.actions import Schedule, place_stages

CLASSES = {
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "zb1p": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
    "dualpipev": theirs.ScheduleDualPipeV,
}


@dataclass
class Stage:
    """As much of a stage as torch's schedules look at when they are made."""

    stage_index: int
    num_stages: int
    group_size: int
    group_rank: int = 0
    has_backward: bool = True
    submod: Any = None

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1


def stages_of(num_ranks: int, stage_ranks: tuple[int, ...]) -> list[Any]:
    """Those of rank 0."""
    mine = [stage for stage, rank in enumerate(stage_ranks) if rank == 0]
    return [Stage(stage, len(stage_ranks), num_ranks, submod=torch.nn.Identity()) for stage in mine]


def torch_order(name: str, num_ranks: int, num: int, per_rank: int) -> dict[int, list[str]] | None:
    """Of each rank, the actions of torch's class; None where it refuses the numbers."""
    stage_ranks = place_stages(num_ranks, per_rank, "v" if name in ("zbv", "dualpipev") else "loop")
    try:
        made = CLASSES[name](stages_of(num_ranks, stage_ranks), num, loss_fn=lambda *args: None)
    except ValueError:
        return None
    return {rank: [str(a) for a in order if a is not None] for rank, order in made.pipeline_order.items()}


def torch_actions(schedule: Schedule) -> dict[int, list[Any]]:
    return {rank: [theirs._Action.from_str(a) for a in order] for rank, order in schedule.lines().items()}


def run_dry(schedule: Schedule) -> None:
    """torch's runtime takes the schedule; its transfers, added as the runtime adds them, can be followed to the end.

    Raises:
        AssertionError, ValueError: if it does not.
    """
    runtime = theirs._PipelineScheduleRuntime(
        stages_of(schedule.num_ranks, schedule.stage_ranks), schedule.num_micro_batches, loss_fn=lambda *args: None
    )
    runtime._prepare_schedule_with_comms(torch_actions(schedule))
    assert runtime.stage_index_to_group_rank == dict(enumerate(schedule.stage_ranks))
    prepared = runtime.pipeline_order_with_comms
    sent = {rank: sum("SEND" in str(a) for a in order) for rank, order in prepared.items()}
    received = {rank: sum("RECV" in str(a) for a in order) for rank, order in prepared.items()}
    assert sum(sent.values()) == sum(received.values())
    # torch's dry run knows neither overlaps nor the actions of sharded weights.
    known = {
        rank: [
            leaf
            for action in order
            for leaf in (action.sub_actions or (action,))
            if leaf.computation_type.value not in ("UNSHARD", "RESHARD", "REDUCE_GRAD")
        ]
        for rank, order in prepared.items()
    }
    theirs._simulate_comms_compute(known, lambda stage: schedule.stage_ranks[stage], schedule.num_stages)
    _follow_blocking(prepared, schedule)


def _follow_blocking(prepared: dict[int, list[Any]], schedule: Schedule) -> None:
    """Ranks whose every send and receive waits for its partner, in the lists' order: the strictest transport."""
    place = dict.fromkeys(prepared, 0)

    def waiting(rank: int) -> Any:
        return prepared[rank][place[rank]] if place[rank] < len(prepared[rank]) else None

    def partner(action: Any) -> tuple[int, str]:
        way, kind = action.computation_type.value.split("_")
        step = (1 if kind == "F" else -1) * (1 if way == "SEND" else -1)
        stage = action.stage_index + step
        return schedule.stage_ranks[
            stage
        ], f"{stage}{'RECV' if way == 'SEND' else 'SEND'}_{kind}{action.microbatch_index}"

    moved = True
    while moved:
        moved = False
        for rank in prepared:
            while (action := waiting(rank)) is not None:
                if "SEND" in str(action) or "RECV" in str(action):
                    other, wanted = partner(action)
                    if str(waiting(other)) != wanted:
                        break
                    place[other] += 1
                place[rank] += 1
                moved = True
    stuck = {rank: str(waiting(rank)) for rank in prepared if waiting(rank) is not None}
    assert not stuck, f"blocking ranks wait for ever at {stuck}"
