"""What each pass of a pipeline's stages takes, measured on the stages themselves before a run starts."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.comm.collectives import all_reduce
from armillary.comm.ledger import Ledger
from armillary.parallel.pipeline.mail import Letter, Mail
from armillary.parallel.pipeline.stage import HiddenShape, Stage
from armillary.parallel.runner import Part

ROUNDS = 3
"""Of which the first warms up, and the fastest counts."""
Times = tuple[float, float, float]
"""Seconds of F, I and W."""


class _Rehearsal(Mail):
    """Mail that goes nowhere: what is expected is there at once, and full of small numbers."""

    def send(self, letter: Letter, tensor: Tensor) -> None:
        pass

    def expect(self, letter: Letter, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def open(self, letter: Letter) -> Tensor:
        return torch.full(self.shape, 1e-3, dtype=self.dtype, device=self.device)

    def local(self, stage: int) -> bool:
        return False


def measure_stages(
    stages: Sequence[nn.Module],
    stage_ranks: Sequence[int],
    part: Part,
    hidden: HiddenShape,
    dtype: torch.dtype,
    *,
    group: dist.ProcessGroup,
    everyone: dist.ProcessGroup,
    ledger: Ledger,
) -> list[Times]:
    """Seconds that each stage of the pipeline takes for a micro-batch like `part`, on its slowest rank.

    All ranks call at once, and get the same list. Weights stay as they are, and gradients are dropped.

    Args:
        stages: this rank's, which hold gathered shards afterwards no more than before.
        stage_ranks: the pipeline rank of every stage.
        part: a micro-batch; its tokens need mean nothing.
        group, everyone: the pipeline axis; all ranks.
    """
    device = part.tokens.device
    times = torch.zeros(len(stage_ranks), 3, dtype=torch.float64, device=device)
    mail = _Rehearsal(stage_ranks, group=group, ledger=ledger, device=device, dtype=dtype)
    numbers = [number for number, rank in enumerate(stage_ranks) if rank == group.rank()]
    for number, module in zip(numbers, stages, strict=True):
        stage = Stage(module, number, mail, hidden, splits_backward=True)
        rounds = [_round(stage, part) for _ in range(ROUNDS)][1:]
        times[number] = torch.tensor([min(seconds) for seconds in zip(*rounds, strict=True)], dtype=torch.float64)
        for parameter in module.parameters():
            parameter.grad = None
    all_reduce(times, group=everyone, ledger=ledger, purpose="measurement", op=dist.ReduceOp.MAX)
    return [(f, i, w) for f, i, w in times.tolist()]


def _round(stage: Stage, part: Part) -> Times:
    """One micro-batch through one stage, timed."""

    def timed(compute: Callable[[], object]) -> float:
        began = time.perf_counter()
        compute()
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
        return time.perf_counter() - began

    stage.begin([part], torch.ones((), device=stage.device))
    if not stage.is_first:
        stage.get_fwd_recv_ops(0)
    forward = timed(lambda: stage.forward_one_chunk(0))
    if not stage.is_last:
        stage.get_bwd_recv_ops(0)
    backward = timed(lambda: stage.backward_one_chunk(0, full_backward=False))
    weights = timed(lambda: stage.backward_weight_one_chunk(0))
    stage.clear_runtime_states()
    stage.sharded.reduce()
    stage.sharded.reshard()
    return forward, backward, weights
