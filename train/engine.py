"""Forward, backward and evaluation of a step's micro-batches. How the plan does it is this file's secret."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from armillary.comm.collectives import all_reduce
from armillary.parallel.mesh import Ranks
from armillary.train.data import Batch, Dataset
from armillary.train.model import IGNORE, Transformer
from armillary.train.optim import clip_, gradient_norm
from armillary.train.share import Share, share


class Engine:
    """Runs a model that a plan has been applied to."""

    def __init__(self, model: Transformer, ranks: Ranks, placement: str = "auto") -> None:
        self.model = model
        self.ranks = ranks
        self.placement = placement

    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Adds the gradient of the step's loss to every parameter; returns the loss.

        The loss is the sum over labelled tokens over their count in all micro-batches of all ranks. It is divided
        before backward, so gradients are those of the global mean whatever the split.
        """
        shares = [share(batch, self.ranks, self.placement) for batch in batches]
        num_labels = self._total(sum(count_labels(part) for part in shares)).clamp(min=1)
        total = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        for index, part in enumerate(shares):
            self._sync_gradients(index == len(shares) - 1)
            loss = self._loss_sum(part) / num_labels
            loss.backward()
            total += loss.detach()
        return self._reduce(total)

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, the same on every rank."""
        return gradient_norm(self.model.parameters(), group=self.ranks.everyone, ledger=self.ranks.ledger)

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scales the gradient down to `max_norm` if it is longer; 0 leaves it."""
        clip_(self.model.parameters(), norm, max_norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], dataset: Dataset) -> tuple[float, float]:
        """Mean loss (nats a token) and bits per byte over the batches of all ranks; each rank has as many batches."""
        sums = torch.zeros(3, device=self.ranks.device, dtype=torch.float64)
        self.model.eval()
        for batch in batches:
            part = share(batch, self.ranks, self.placement)
            loss = self._loss_sum(part).double()
            facts = [count_labels(part), dataset.label_bytes(part.labels)]
            sums += torch.stack([loss, *torch.tensor(facts, dtype=torch.float64, device=loss.device)])
        self.model.train()
        # Without a backward pass, what stays gathered after forward would stay so, and be saved and loaded as such: in
        # the compute dtype, not the weights' own. FSDP2's reshard takes one module at a time.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        loss, labels, num_bytes = self._reduce(sums).tolist()
        return loss / max(labels, 1.0), loss / max(num_bytes, 1.0) / 0.6931471805599453

    def _loss_sum(self, part: Share) -> Tensor:
        tokens, labels = (
            torch.from_numpy(array).to(self.ranks.device, non_blocking=True) for array in (part.tokens, part.labels)
        )
        return self.model(tokens, part.places, labels)

    def _sync_gradients(self, sync: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(sync)

    def _total(self, count: int) -> Tensor:
        return self._reduce(torch.tensor(count, device=self.ranks.device, dtype=torch.int64))

    def _reduce(self, tensor: Tensor) -> Tensor:
        return all_reduce(tensor, group=self.ranks.everyone, ledger=self.ranks.ledger, purpose="statistics")


def count_labels(part: Share) -> int:
    """How many tokens of a rank's share carry a label."""
    return int((part.labels != IGNORE).sum())
