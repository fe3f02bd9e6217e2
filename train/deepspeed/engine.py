"""DeepSpeed's ZeRO as an engine of a run: the same model, batches, losses, steps and checkpoints as our own.

The model is cut for tensor and context parallelism as always; only what shards it over the data plane is another. To
everything that asks for shards of whole rows (checkpoints, parity) it shows such, made for the occasion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armillary.comm.collectives import all_reduce
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks
from armillary.parallel.runner import Part
from armillary.parallel.tensor.replicas import sum_replicas
from armillary.train.deepspeed.start import environment, start
from armillary.train.deepspeed.state import GRADIENTS, MOMENTS, WEIGHTS, ZeroState
from armillary.train.engine import Engine
from armillary.train.optim.optimizers import Optimizers, optimizers_of
from armillary.train.optim.schedule import OptimConfig


class DeepSpeedRunner:
    """See `parallel.runner.Runner`: micro-batches one after the other through a DeepSpeed engine."""

    def __init__(self, engine: Any, ranks: Ranks, scale: float) -> None:
        """
        Args:
            engine: DeepSpeed's.
            ranks: the mesh of the plan.
            scale: what the loss is multiplied by, where gradients are averaged that are to be summed.
        """
        self.engine, self.ranks, self.scale = engine, ranks, scale

    def forward_backward(self, parts: Sequence[Part], divisor: Tensor) -> Tensor:
        """Stage 1 reduces after the last micro-batch, stages 2 and 3 after each."""
        total = torch.zeros((), device=divisor.device, dtype=torch.float64)
        for index, part in enumerate(parts):
            self.engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            loss = self.loss(part) / divisor
            with environment(self.ranks):
                self.engine.backward(loss * self.scale, scale_wrt_gas=False)
            total += loss.detach()
        return total

    def loss(self, part: Part) -> Tensor:
        with environment(self.ranks):
            return self.engine(part.tokens, part.places, part.labels)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedHeld(Held):
    """What a rank holds of a model that DeepSpeed shards. The rows that it shows are copies, made when they are asked
    for, on all ranks at once. What is filled into them counts once `update_twins` has been called, as after loading."""

    state: ZeroState

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's rows of each parameter, and after the last backward pass of a step of its gradient."""
        parameters = {name: nn.Parameter(rows) for name, rows in self.state.shown(WEIGHTS).items()}
        if self.state.ready:
            for name, gradient in self.state.shown(GRADIENTS).items():
                parameters[name].grad = gradient
        return parameters

    def complete_gradients(self) -> None:
        """Adds up what replicas have of each gradient, and makes gradients ready for norm, clipping and step."""
        self.state.settle()
        if self.ranks.tensor.size() > 1:
            rows = self.state.pull(GRADIENTS)
            sum_replicas(rows, self.cuts, group=self.ranks.tensor, ledger=self.ranks.ledger)
            self.state.push(GRADIENTS, rows)

    def update_twins(self) -> None:
        """Takes over what has been filled into the rows."""
        self.state.take_over()


class DeepSpeedEngine(Engine):
    """Runs a model that DeepSpeed shards."""

    held: DeepSpeedHeld

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, the same on every rank; of the flat partitions, without bringing rows together.

        Float32, or float64 for a float64 model; summed in float64.
        """
        gradients = self.held.state.counted_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for flat in gradients:
            # By short stretches: one float32 sum over millions of elements would be off in the fourth digit.
            whole = flat[: flat.numel() // 1024 * 1024].view(-1, 1024)
            for part in (whole, flat[whole.numel() :].unsqueeze(0)):
                total += torch.linalg.vector_norm(part, dim=-1).double().square().sum()
        all_reduce(total, group=self.ranks.everyone, ledger=self.ranks.ledger, purpose="gradient norm")
        wide = self.held.state.masters()[0].dtype == torch.float64
        return total.sqrt().to(torch.float64 if wide else torch.float32)

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scales the gradient down to `max_norm` if it is longer; 0 leaves it."""
        if max_norm:
            torch._foreach_mul_(self.held.state.gradients(), (max_norm / (norm + 1e-6)).clamp(max=1.0))


@dataclass(frozen=True, eq=False, kw_only=True)
class DeepSpeedOptimizers(Optimizers):
    """AdamW on DeepSpeed's flat partitions."""

    engine: Any
    """DeepSpeed's."""
    state: ZeroState

    def step(self, ratio: float) -> None:
        """Updates all weights, at `ratio` times each group's peak learning rate."""
        self.set_rates(ratio)
        self.engine.step()
        self.state.changed()

    def zero_grad(self) -> None:
        """Drops all gradients that no step has used."""
        if self.state.ready:
            self.state.drop()

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as `optimizer/<state key>/<parameter name>`, in rows; the count is each partition's own."""
        masters, where = self.state.masters(), self.state.where
        counts = {f"optimizer/step/{name}": self.state.state_of(masters[at])["step"] for name, (at, _) in where.items()}
        moments = {key: self.state.shown(key) for key in MOMENTS}
        return counts | {f"optimizer/{key}/{name}": rows[name] for key, rows in moments.items() for name in rows}

    def create_state(self) -> None:
        """Allocates the zero state that the first step would start from, where there is none yet."""
        self.state.create_state()


def shard_with_deepspeed(held: Held, stage: int, config: OptimConfig, placement: str) -> DeepSpeedEngine:
    """Hands a model to DeepSpeed. Its weights must be filled afterwards (`fill` of each parameter, `update_twins`).

    Args:
        held: one stage, cut by tensor and context parallelism but not sharded, allocated, in the weights' dtype.
        stage: of ZeRO: 1, 2 or 3.

    Raises:
        ValueError: if DeepSpeed is not installed.
    """
    (model,) = held.stages
    # AdamW, decaying as everywhere; DeepSpeed takes the parameters out and puts its partitions in.
    plain = optimizers_of(held.parameters(), config)
    engine = start(model, plain.optimizers[0], stage, config, held.ranks)
    state = ZeroState(engine.optimizer, plain.names, held.cuts, held.ranks)
    optimizers = DeepSpeedOptimizers(plain.optimizers, plain.names, engine=engine, state=state)
    sharded = DeepSpeedHeld(held.stages, held.cuts, held.ranks, held.last, state=state)
    scale = float(held.ranks.plane.size()) if stage == 3 else 1.0
    return DeepSpeedEngine(sharded, optimizers, DeepSpeedRunner(engine, held.ranks, scale), placement)
