"""A model under its plan, with its optimizers: forward, backward and evaluation of a step's micro-batches. How the plan
does it is this file's secret."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from armillary.comm.collectives import all_reduce
from armillary.parallel.held import Held
from armillary.parallel.runner import Runner
from armillary.train.data.dataset import Batch, Dataset
from armillary.train.optim.optimizers import Optimizers, clip_, gradient_norm
from armillary.train.share import share


class Engine:
    """Runs a model that a plan has been applied to."""

    def __init__(
        self, held: Held, optimizers: Optimizers, runner: Runner, placement: str = "auto", note: str = ""
    ) -> None:
        """
        Args:
            held: what this rank holds of the model.
            optimizers: of `held`.
            runner: takes micro-batches through it.
            placement: `plan.placement`.
            note: what a person should know of the runner.
        """
        self.held, self.optimizers, self.runner, self.placement, self.note = held, optimizers, runner, placement, note
        self.ranks = held.ranks

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Adds the gradient of the step's loss to every parameter; returns the loss.

        The loss is the sum over labelled tokens over their count in all micro-batches of all ranks. It is divided
        before backward, so gradients are those of the global mean whatever the split.
        """
        shares = [share(batch, self.ranks, self.placement) for batch in batches]
        labels = sum(each.num_labels for each in shares) if self._speaks else 0
        num_labels = self._reduce(torch.tensor(labels, device=self.ranks.device, dtype=torch.int64)).clamp(min=1)
        loss = self.runner.forward_backward([each.on(self.ranks.device) for each in shares], num_labels)
        self.held.complete_gradients()
        return self._reduce(loss if self._counts_loss else torch.zeros_like(loss))

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, the same on every rank."""
        return gradient_norm(self.held.counted(), group=self.ranks.everyone, ledger=self.ranks.ledger)

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scales the gradient down to `max_norm` if it is longer; 0 leaves it."""
        clip_(self.held.parameters().values(), norm, max_norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], dataset: Dataset) -> tuple[float, float]:
        """Mean loss (nats a token) and bits per byte over the batches of all ranks; each rank has as many batches."""
        sums = torch.zeros(3, device=self.ranks.device, dtype=torch.float64)
        for stage in self.held.stages:
            stage.eval()
        for batch in batches:
            each = share(batch, self.ranks, self.placement)
            loss = self.runner.loss(each.on(self.ranks.device)).double()
            facts = [each.num_labels, dataset.label_bytes(each.labels)] if self._speaks else [0, 0]
            loss = loss if self._counts_loss else torch.zeros_like(loss)
            sums += torch.stack([loss, *torch.tensor(facts, dtype=torch.float64, device=loss.device)])
        for stage in self.held.stages:
            stage.train()
            # Without a backward pass, what stays gathered after forward would stay so, and be saved and loaded as such:
            # in the compute dtype, not the weights' own. FSDP2's reshard takes one module at a time.
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        loss, labels, num_bytes = self._reduce(sums).tolist()
        return loss / max(labels, 1.0), loss / max(num_bytes, 1.0) / 0.6931471805599453

    @property
    def _counts_loss(self) -> bool:
        """Whether the loss that this rank computes is one that no other counts: the tensor ranks all have the same."""
        return self.ranks.tensor.rank() == 0

    @property
    def _speaks(self) -> bool:
        """Whether this rank counts its labels: its pipeline and tensor ranks have the same tokens."""
        return self.ranks.tensor.rank() == 0 and self.ranks.pipeline.rank() == 0

    def _reduce(self, tensor: Tensor) -> Tensor:
        return all_reduce(tensor, group=self.ranks.everyone, ledger=self.ranks.ledger, purpose="statistics")
