"""torch's pipeline runtime, given our order of actions and our stages.

The runtime adds what an order of computation leaves out: sends and receives, in an order in which no rank waits for
ever, and for FSDP when to gather a stage, free it and reduce its gradients. It is private to torch; what is used of it
is the same in 2.11 and 2.13, and everything that they set up differently is replaced here.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    FORWARD,
    OVERLAP_F_B,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
)

from armillary.parallel.pipeline.stage import Stage
from armillary.parallel.schedule.actions import Schedule


class Runtime(_PipelineScheduleRuntime):
    """Runs one rank's actions."""

    def __init__(self, stages: Sequence[Stage], schedule: Schedule, overlap: bool) -> None:
        super().__init__(list(stages), schedule.num_micro_batches, scale_grads=False)
        schedule = schedule if overlap else schedule.flat()
        lines = schedule.lines().items()
        self._prepare_schedule_with_comms({rank: [_Action.from_str(line) for line in order] for rank, order in lines})
        self._own: dict[int, Any] = {stage.stage_index: stage for stage in stages}
        if overlap and schedule.overlaps:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="pipeline-backward")
            self.register_custom_function(OVERLAP_F_B, self._overlapped)
            if stages[0].device.type == "cuda":
                for stage in stages:
                    stage.stream = torch.cuda.Stream(stage.device)

    def run(self) -> None:
        """Every action of this rank, once. A run that failed leaves nothing to the next but its messages."""
        self.fwd_recv_ops.clear()
        self.bwd_recv_ops.clear()
        self._step_microbatches()

    def _initialize_stages(self, *_args: Any, **_options: Any) -> None:
        """Our stages need no rehearsal: shapes follow from the micro-batches."""

    def _overlapped(self, action: _Action, ctx: _PipelineContext) -> None:
        """A forward and a backward at once: the backward on a thread of its own, on a GPU each on its stage's stream.

        Neither moves anything between ranks while it computes, or the caller has seen to it that what they move goes
        through unlike groups (see Pipeline). Threads, since torch lets go of Python's lock inside an operation; the
        autograd engine keeps no state of a thread that the two would share.
        """
        assert action.sub_actions is not None
        forward, backward = action.sub_actions
        if forward.stage_index == backward.stage_index:
            # FSDP keeps one state a module: a forward pass amid a backward pass passes for a recomputation.
            self._compute(forward)
            self._compute(backward)
            return
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        finished = self._worker.submit(self._compute_on, stream, backward)
        try:
            self._compute(forward)
        finally:
            finished.result()

    def _compute_on(self, stream: Any, action: _Action) -> None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._compute(action)

    def _compute(self, action: _Action) -> None:
        """A forward or a backward, as the runtime itself would compute it."""
        stage, micro_batch = self._own[action.stage_index], action.microbatch_index
        assert micro_batch is not None
        self._assert_unsharded(stage)
        if action.computation_type == FORWARD:
            self.fwd_recv_ops.pop((stage.stage_index, micro_batch), None)
            output = stage.forward_one_chunk(micro_batch)
            if after := self._own.get(stage.stage_index + 1):
                after.set_local_fwd_input(output, micro_batch)
            return
        self.bwd_recv_ops.pop((stage.stage_index, micro_batch), None)
        stage.backward_one_chunk(micro_batch, full_backward=action.computation_type != BACKWARD_INPUT)
        if before := self._own.get(stage.stage_index - 1):
            before.set_local_bwd_input(stage.get_local_bwd_output(micro_batch), micro_batch)
