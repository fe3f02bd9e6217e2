"""Pipeline parallelism: a model's stages on several ranks, run by a schedule.

A stage module is a Transformer (train/model/transformer.py) cut to some of its layers (pipeline/cut_model.py) and
changed by the rest of a plan: `module(x, places, labels)` takes tokens where it begins and hidden elsewhere, returns
hidden, or where it ends, with labels, the SUM of the loss. It may be an FSDP root; then its weights are gathered when
the schedule comes to it, and its gradients reduced once a step.

How it works: torch's runtime (pipeline/torch_runtime.py) drives our stages (pipeline/stage.py) by our schedules
(schedule/); messages go through pipeline/mail.py.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.comm.ledger import Ledger
from armillary.parallel.pipeline.mail import Letter, Mail
from armillary.parallel.pipeline.stage import HiddenShape, Stage
from armillary.parallel.pipeline.torch_runtime import Runtime
from armillary.parallel.runner import Part
from armillary.parallel.schedule.actions import Schedule


class Pipeline:
    """Runs the stages of this rank together with those of the other ranks of its pipeline group."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        *,
        group: dist.ProcessGroup,
        ledger: Ledger,
        device: torch.device,
        dtype: torch.dtype,
        hidden: HiddenShape,
        overlap: bool = False,
    ) -> None:
        """Takes over the stages: where the schedule splits backward passes, their linear layers are made to.

        Args:
            stages: this rank's, in the model's order.
            schedule: the same on all ranks of the group; says which stages a rank holds.
            group: the pipeline axis.
            ledger: messages are counted as `pipeline`.
            dtype: of hidden, between stages.
            hidden: shape of this rank's hidden for a micro-batch of these places; the same on neighbouring ranks.
            overlap: compute the schedule's overlaps (DualPipeV) as such, in two threads and on a GPU on two streams.
                ONLY where stages move nothing between ranks while they compute, or forward and backward passes move it
                through unlike groups: two threads may start collectives of one group in another order on another rank,
                which then wait for each other for ever. Otherwise an overlap is computed one part after the other.

        Raises:
            ValueError: if the schedule gives this rank another number of stages, or the group has another size.
        """
        numbers = schedule.stages_of(group.rank())
        if schedule.num_ranks != group.size() or len(numbers) != len(stages):
            raise ValueError(
                f"pipeline: schedule {schedule.name} is for {schedule.num_ranks} ranks, of which number {group.rank()} "
                f"has {len(numbers)} stages; given {len(stages)} stages and a group of {group.size()}"
            )
        self.schedule = schedule
        self._mail = Mail(schedule.stage_ranks, group=group, ledger=ledger, device=device, dtype=dtype)
        self._stages = [
            Stage(module, number, self._mail, hidden, schedule.splits_backward)
            for module, number in zip(stages, numbers, strict=True)
        ]
        self._runtime = Runtime(self._stages, schedule, overlap)

    def forward_backward(self, parts: Sequence[Part], divisor: Tensor) -> Tensor:
        """Adds the gradient of the sum of all losses over `divisor` to every parameter of this rank's stages.

        Args:
            parts: one a micro-batch, as many as the schedule has; the same on all ranks of the group, of any shapes.
            divisor: 0-d, of any dtype.

        Returns:
            This rank's sum of the losses over `divisor`, float64, 0-d: 0 where the rank does not hold the last stage.

        Raises:
            ValueError: if there are not as many parts as micro-batches.
        """
        if len(parts) != self.schedule.num_micro_batches:
            raise ValueError(
                f"pipeline: {len(parts)} parts for schedule {self.schedule.name} of {self.schedule.num_micro_batches} "
                "micro-batches; make a Pipeline for each number"
            )
        for stage in self._stages:
            stage.begin(parts, divisor)
        self._runtime.run()
        self._mail.settle_all()
        assert self.is_clear, "a step has left something of a micro-batch"
        total = torch.zeros((), device=self._mail.device, dtype=torch.float64)
        for stage in self._stages:
            stage.parts = ()
            total += stage.total
        return total

    @torch.no_grad()
    def loss(self, part: Part) -> Tensor:
        """Forward only: the SUM of the loss, float64, 0-d, or 0 where the rank does not hold the last stage.

        Every rank of the group calls it as often, with the same parts in the same order. Afterwards FSDP stages are
        still gathered, so that they are gathered once for many parts: call `reshard` after the last.
        """
        result = torch.zeros((), device=self._mail.device, dtype=torch.float64)
        shape = self._stages[0].hidden(part.places)
        x = part.tokens
        for stage in self._stages:
            index = stage.stage_index
            if not stage.is_first and not self._mail.local(index - 1):
                self._mail.expect(Letter(index - 1, 0, True), shape)
                x = self._mail.open(Letter(index - 1, 0, True))
            x = stage.submod(x, part.places, part.labels if stage.is_last else None)
            if stage.is_last:
                result = x.double()
            elif not self._mail.local(index + 1):
                self._mail.send(Letter(index, 0, True), x)
        self._mail.settle_all()
        return result

    def reshard(self) -> None:
        """Frees the weights that an evaluation has gathered."""
        for stage in self._stages:
            stage.sharded.reshard()

    @property
    def is_clear(self) -> bool:
        """Whether no micro-batch is under way: nothing of one is held, nothing of one is on its way."""
        return self._mail.empty and all(stage.is_clear for stage in self._stages)
