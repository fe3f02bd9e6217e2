"""The same plan assembled by hand from torch's pieces: what `armillary bench compose` measures ours against.

DTensor's tensor parallelism with sequence parallelism and a parallel loss, torch's pipeline stages and schedules, FSDP2
over the data axis, a global gradient norm over all of them, fused AdamW: put together as torch's own documentation and
torchtitan do it. torch's pieces move their bytes
themselves, so no ledger counts them.
"""

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from armillary.comm.collectives import all_reduce
from armillary.comm.ledger import Ledger
from armillary.launch.bench.compose_peer_model import Llama, initialised, keep_stage
from armillary.parallel.mesh import Ranks
from armillary.parallel.schedule.actions import place_stages
from armillary.train.config.run_config import RunConfig


def cut_tensors(model: Llama, mesh: DeviceMesh) -> None:
    """DTensor's tensor parallelism with sequence parallelism, in place."""
    ends: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, {name: how for name, how in ends.items() if getattr(model, name) is not None})
    for block in model.blocks.values():
        whole: dict[str, Any] = {
            "input_layouts": (Shard(1), None, None),
            "desired_input_layouts": (Replicate(), None, None),
        }
        layer: dict[str, Any] = {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(**whole),
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "ffn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "ffn.gate": ColwiseParallel(),
            "ffn.up": ColwiseParallel(),
            "ffn.down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, layer)


def shard(model: Llama, mesh: DeviceMesh, gathered: bool) -> None:
    """FSDP2, block by block; `gathered`: weights stay whole between forward and backward."""
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=not gathered)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in [*model.blocks.values(), model]:
        # The loss is divided by the tokens of all ranks, so gradients are summed.
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


class ByHand:
    """One rank's part of the model, its optimizer, and a training step."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """`config.plan` has no context axis, and names the layers of each stage."""
        self.config, self.plan, self.mesh, self.everyone = config, config.plan, ranks.mesh, ranks.everyone
        self.ledger = Ledger()
        self.divisor = torch.ones((), dtype=torch.int64)
        numbers = self._numbers()
        self.stages = [self._stage(number) for number in numbers]
        self.is_last = self.plan.num_stages - 1 in numbers
        self.schedule = self._schedule(numbers, ranks.device) if self.plan.pp > 1 else None
        self.parameters = [parameter for stage in self.stages for parameter in stage.parameters()]
        self.optimizer = self._optimizer()

    def step(self, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
        """One optimizer step on this data rank's sequences; the loss of all ranks, and the gradient's norm."""
        self.divisor = (labels >= 0).sum()
        if self.plan.dp > 1:
            self._add_up(self.divisor, self.mesh.get_group("dp"))
        with loss_parallel() if self.plan.tp > 1 else nullcontext():
            loss = self._forward_backward(tokens, labels)
        own = loss if self.mesh.get_local_rank("tp") == 0 else torch.zeros_like(loss)
        self._add_up(own, self.everyone)
        norm = self._norm()
        result = own.item(), norm.item()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def _forward_backward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        if self.schedule is None:
            (model,) = self.stages
            loss = self._loss(model(tokens), labels)
            loss.backward()
            return _local(loss.detach())
        losses: list[Tensor] = []
        inputs = (tokens,) if self.mesh.get_local_rank("pp") == 0 else ()
        if self.is_last:
            self.schedule.step(*inputs, target=labels, losses=losses, return_outputs=False)
        else:
            self.schedule.step(*inputs, return_outputs=False)
        return sum((_local(loss.detach()) for loss in losses), torch.zeros(()))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="sum") / self.divisor

    def _norm(self) -> Tensor:
        """Of the whole gradient: DTensor adds up over data and tensor ranks, pipeline ranks are added up here."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.plan.pp > 1:
            norm = norm**2
            self._add_up(norm, self.mesh.get_group("pp"))
            norm = norm**0.5
        return norm

    def _add_up(self, number: Tensor, group: Any) -> None:
        # A bare all-reduce but for a note in a ledger, which nobody reads here.
        all_reduce(number, group=group, ledger=self.ledger, purpose="by hand")

    def _numbers(self) -> list[int]:
        """Stages of this rank."""
        if self.plan.pp == 1:
            return [0]
        places = place_stages(self.plan.pp, self.plan.per_rank, "v" if self.plan.schedule == "zbv" else "loop")
        return [number for number, rank in enumerate(places) if rank == self.mesh.get_local_rank("pp")]

    def _stage(self, number: int) -> Llama:
        model = initialised(self.config.model, self.config.data.sequence_length)
        if self.plan.pp > 1:
            first = list(accumulate(self.plan.layers, initial=0))[number]
            layers = range(first, first + self.plan.layers[number])
            keep_stage(model, layers, number == 0, number == self.plan.num_stages - 1)
        if self.plan.tp > 1:
            cut_tensors(model, self.mesh["tp"])
        if self.plan.dp > 1:
            shard(model, self.mesh["dp"], gathered=self.plan.pp > 1)
        return model

    def _schedule(self, numbers: list[int], device: torch.device) -> Any:
        group, num = self.mesh.get_group("pp"), self.plan.num_stages
        pairs = zip(self.stages, numbers, strict=True)
        stages = [PipelineStage(stage, number, num, device, group=group) for stage, number in pairs]
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if self.plan.schedule == "zbv":
            return ScheduleZBVZeroBubble(stages, self.config.optim.micro_batches, **options)  # type: ignore[arg-type]
        return Schedule1F1B(stages[0], self.config.optim.micro_batches, **options)

    def _optimizer(self) -> torch.optim.Optimizer:
        """Only matrices decay, and the embedding does not: as ours."""
        named = [pair for stage in self.stages for pair in stage.named_parameters()]
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in named:
            groups[parameter.ndim > 1 and name != "embedding.weight"].append(parameter)
        optim = self.config.optim
        return torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": optim.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
