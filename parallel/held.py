"""What one rank holds of a model under a plan: parameters by name, and where each lies in the whole.

With tied embeddings the last stage of a pipeline needs the first one's matrix too. Its copy is a twin: the first stage
owns the parameter, counts it, updates it and saves it; the twin gives its gradient and takes the new values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from armillary.comm import exchange
from armillary.comm.collectives import all_reduce
from armillary.parallel.cut import Box, Cut
from armillary.parallel.mesh import Ranks
from armillary.parallel.tensor.replicas import sum_replicas

EMBEDDING = "embedding.weight"
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Held:
    """The stages of a model that one rank holds, one if there is no pipeline."""

    stages: tuple[nn.Module, ...]
    cuts: dict[str, Cut]
    """Of every parameter of the whole model, in its order; the same on all ranks."""
    ranks: Ranks
    last: int = 0
    """The pipeline rank that holds the last stage; the first is always on rank 0."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the whole model; twins are not among them."""
        twin = self.twin
        named = (pair for stage in self.stages for pair in stage.named_parameters())
        return {clean_name(name): parameter for name, parameter in named if parameter is not twin}

    @property
    def twin(self) -> nn.Parameter | None:
        """This rank's copy of a tied embedding that another stage owns."""
        stage = self.stages[-1]
        if not stage.ends or stage.begins or stage.output is not None:
            return None
        return stage.embedding.weight

    def speaks(self, name: str) -> bool:
        """Whether this rank counts and saves its part of a parameter, of which replicas may hold the same."""
        return self.cuts[name].speaks(self.ranks.tensor.rank())

    def box(self, name: str) -> Box:
        """Where this rank's shard of a parameter lies in the whole."""
        plane = self.ranks.plane.get_group()
        return self.cuts[name].shard(self.ranks.tensor.rank(), plane.rank(), plane.size())

    def counted(self) -> list[nn.Parameter]:
        """The parameters that this rank counts: over all ranks, each element of the model once."""
        return [parameter for name, parameter in self.parameters().items() if self.speaks(name)]

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Adds up what replicas and twins have of each gradient. Once a step, after the last backward."""
        if self.ranks.tensor.size() == 1 and not self._is_tied:
            return
        gradients = {name: local(p.grad) for name, p in self.parameters().items() if p.grad is not None}
        if self.ranks.tensor.size() > 1:
            sum_replicas(gradients, self.cuts, group=self.ranks.tensor, ledger=self.ranks.ledger)
        if self._is_tied:
            owned = gradients.get(EMBEDDING)
            twin = self.twin
            given = None if twin is None or twin.grad is None else local(twin.grad)
            arrived = self._pass_on(given, owned, self.last, 0)
            if owned is not None and arrived is not None:
                owned.add_(arrived)
            if twin is not None:
                twin.grad = None

    @torch.no_grad()
    def update_twins(self) -> None:
        """Brings the values of a tied embedding to its twin, after every change."""
        if self._is_tied:
            owned, twin = self.parameters().get(EMBEDDING), self.twin
            arrived = self._pass_on(
                None if owned is None else local(owned), None if twin is None else local(twin), 0, self.last
            )
            if twin is not None and arrived is not None:
                local(twin).copy_(arrived)

    @property
    def _is_tied(self) -> bool:
        return self.ranks.pipeline.size() > 1 and "output.weight" not in self.cuts

    def _pass_on(self, given: Tensor | None, like: Tensor | None, source: int, to: int) -> Tensor | None:
        """`given` of pipeline rank `source`, on pipeline rank `to`, where `like` has its shape; None on others."""
        rank = self.ranks.pipeline.rank()
        if source == to:
            return given if rank == to else None
        sends = [exchange.Send(given, to)] if rank == source and given is not None else []
        receives = []
        if rank == to and like is not None:
            receives.append(exchange.Receive(tuple(like.shape), like.dtype, source))
        facts = {"group": self.ranks.pipeline, "ledger": self.ranks.ledger, "device": self.ranks.device}
        arrived = exchange.start(sends, receives, purpose="tied", **facts).wait()  # type: ignore[arg-type]
        return arrived[0] if arrived else None

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor, full: Tensor) -> None:
        """Fills this rank's part of a parameter, or of what is shaped as it, from the whole."""
        local(tensor).copy_(part_of(full, self.box(name)))

    def whole(self, name: str, tensor: Tensor | None, dtype: torch.dtype, purpose: str) -> Tensor:
        """What is shaped and sharded as a parameter (its values, gradient, moments) put together, on every rank."""
        return self.wholes([(name, tensor)], dtype, purpose)[0]

    @torch.no_grad()
    def wholes(
        self, parts: Sequence[tuple[str, Tensor | None]], dtype: torch.dtype, purpose: str
    ) -> tuple[Tensor, ...]:
        """What is shaped and sharded as parameters, each by its name, put together in one collective, on every rank.

        All ranks ask for the same names in the same order; one that does not hold a parameter gives None for it. Each
        element is one rank's, so the sum that brings them together is exact.
        """
        shapes = [self.cuts[name].shape for name, _ in parts]
        joined = torch.zeros(sum(map(math.prod, shapes)), dtype=dtype, device=self.ranks.device)
        pieces = joined.split([math.prod(shape) for shape in shapes])
        for (name, tensor), piece, shape in zip(parts, pieces, shapes, strict=True):
            if tensor is not None and self.speaks(name):
                part_of(piece.view(shape), self.box(name)).copy_(local(tensor))
        all_reduce(joined, group=self.ranks.everyone, ledger=self.ranks.ledger, purpose=purpose)
        return tuple(piece.view(shape).clone() for piece, shape in zip(pieces, shapes, strict=True))


def part_of(full: Tensor, box: Box) -> Tensor:
    """The view of a box of a tensor."""
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        full = full.narrow(dim, offset, size)
    return full


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds: the memory itself, under `no_grad`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile, checkpoint_wrapper and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
