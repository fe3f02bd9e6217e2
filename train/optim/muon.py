"""Muon for matrices that are sharded over ranks, each rank holding a box of rows and columns.

The momentum lives on the shard. Newton-Schulz needs the whole matrix, so for each bucket of matrices one all_to_all
brings every matrix together on one rank, its owner, which orthogonalises it; a second one takes the boxes of the update
back. Each matrix is worked on once, and crosses the network twice. Matrices that are not sharded need no exchange.

Sources: Jordan 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon, whose coefficients, epsilon and learning
rate adjustment these are, but which iterates in bfloat16 always and knows no shards.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from armillary.comm.collectives import all_to_all
from armillary.comm.ledger import Ledger
from armillary.parallel.cut import Box, Cut
from armillary.parallel.held import local, part_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
BUCKET_ELEMENTS = 32 * 2**20

Shape = tuple[int, int]


@dataclass(frozen=True)
class Spread:
    """How one matrix lies on the ranks of a group."""

    shape: Shape
    """Of the whole."""
    boxes: tuple[Box, ...]
    """What each rank holds."""
    speaks: tuple[bool, ...]
    """Whether a rank's box is to be taken into account: of ranks that hold the same, one."""

    @classmethod
    def of(cls, cut: Cut, plane: int) -> "Spread":
        """Of a cut over tensor ranks and a plane of so many ranks, the tensor ranks innermost."""
        height, width = cut.shape
        ranks = [(index, rank) for index in range(plane) for rank in range(len(cut.parts))]
        boxes = tuple(cut.shard(rank, index, plane) for index, rank in ranks)
        return cls((height, width), boxes, tuple(cut.speaks(rank) for _, rank in ranks))


class Muon(Optimizer):
    """Momentum, orthogonalised, as the update of matrices (Nesterov; decoupled weight decay).

    All ranks give the same matrices in the same order, and have gradients for the same ones.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        group: dist.ProcessGroup | None,
        ledger: Ledger,
        spreads: Mapping[Tensor, Spread] | None = None,
    ) -> None:
        """
        Args:
            params: 2-D parameters of one dtype and device, not empty.
            lr: learning rate of a matrix that is not taller than wide; else times sqrt(rows / columns).
            momentum: decay of the mean gradient.
            weight_decay: share of a weight that is taken off per step, times `lr`.
            group: the ranks that hold the shards; None for one process.
            ledger: counts the bytes, under the purpose "muon".
            spreads: how those lie on the group that are sharded over it; all others are whole here.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.ndim == 2 for g in self.param_groups for p in g["params"])
        self.process_group = group
        self.ledger = ledger
        self.spreads = spreads or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for settings in self.param_groups:
            matrices = [p for p in settings["params"] if p.grad is not None]
            for p in matrices:
                if p not in self.spreads:
                    update = orthogonalise(self._direction(p, settings["momentum"]))
                    _apply(p, update, (p.shape[0], p.shape[1]), settings)
            sharded = [p for p in matrices if p in self.spreads]
            if sharded:
                self._update_sharded(sharded, settings)

    def _update_sharded(self, matrices: list[Tensor], settings: dict[str, Any]) -> None:
        assert self.process_group is not None
        facts: dict[str, Any] = {"group": self.process_group, "ledger": self.ledger}
        spreads = [self.spreads[p] for p in matrices]
        for bucket in plan_buckets([s.shape for s in spreads], self.process_group.size(), BUCKET_ELEMENTS):
            indices, owners = zip(*bucket, strict=True)
            directions = [self._direction(matrices[i], settings["momentum"]) for i in indices]
            updates = orthogonalise_shards(directions, [spreads[i] for i in indices], owners, **facts)
            for i, update in zip(indices, updates, strict=True):
                _apply(matrices[i], update, spreads[i].shape, settings)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """This rank's part of the Nesterov momentum, in the dtype of the iteration."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, buffer = local(parameter.grad), local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum).to(iteration_dtype(parameter))


def _apply(parameter: Tensor, update: Tensor, shape: Shape, settings: dict[str, Any]) -> None:
    """Decays and updates this rank's part of a matrix of `shape`."""
    rows, columns = shape
    weight = local(parameter)
    weight.mul_(1 - settings["lr"] * settings["weight_decay"])
    weight.add_(update, alpha=-settings["lr"] * math.sqrt(max(1, rows / columns)))


def iteration_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 weights, so that rounding hides nothing; else bfloat16 on a GPU, float32 on a CPU."""
    if parameter.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if parameter.device.type == "cuda" else torch.float32


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U Vᵀ of the matrix U S Vᵀ (its singular values come to lie around 1), by a quintic Newton-Schulz iteration.

    Works in the matrix's dtype and makes the same roundings as torch.optim.Muon. A zero matrix gives zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def orthogonalise_shards(
    shards: Sequence[Tensor],
    spreads: Sequence[Spread],
    owners: Sequence[int],
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
) -> list[Tensor]:
    """This rank's parts of the orthogonalised matrices.

    Args:
        shards: this rank's part of each matrix; all of one dtype; some may be empty.
        spreads: how the matrices lie on the ranks.
        owners: the rank of the group that works on each matrix.
        group: the ranks that hold the shards.
        ledger: counts the bytes, under the purpose "muon".
    """
    ranks, rank = range(group.size()), group.rank()
    assert all(tuple(shard.shape) == s.boxes[rank][1] for shard, s in zip(shards, spreads, strict=True))
    owned_by = [[index for index, owner in enumerate(owners) if owner == r] for r in ranks]
    mine = owned_by[rank]

    def spoken(index: int, r: int) -> bool:
        return spreads[index].speaks[r]

    arrived = _exchange(
        [[shards[index] for index in owned_by[r] if spoken(index, rank)] for r in ranks],
        [[spreads[index].boxes[r][1] for index in mine if spoken(index, r)] for r in ranks],
        shards[0],
        group=group,
        ledger=ledger,
    )
    matrices = {index: shards[0].new_empty(spreads[index].shape) for index in mine}
    for r in ranks:
        for index, piece in zip([index for index in mine if spoken(index, r)], arrived[r], strict=True):
            part_of(matrices[index], spreads[index].boxes[r]).copy_(piece)
    updates = {index: orthogonalise(matrix) for index, matrix in matrices.items()}
    arrived = _exchange(
        [[part_of(updates[index], spreads[index].boxes[r]) for index in mine] for r in ranks],
        [[spreads[index].boxes[rank][1] for index in owned_by[r]] for r in ranks],
        shards[0],
        group=group,
        ledger=ledger,
    )
    found = {index: piece for r in ranks for index, piece in zip(owned_by[r], arrived[r], strict=True)}
    return [found[index] for index in range(len(shards))]


def _exchange(
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    *,
    group: dist.ProcessGroup,
    ledger: Ledger,
) -> list[list[Tensor]]:
    """Sends the tensors of list r to rank r; returns what each rank sent: of the given shapes, dtype as `like`."""
    empty = like.new_empty(0)
    flat = torch.cat([empty, *(tensor.reshape(-1) for tensors in outgoing for tensor in tensors)])
    sizes_in = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    sizes_out = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
    received = like.new_empty(sum(sizes_out))
    all_to_all(received, flat, sizes_out, sizes_in, group=group, ledger=ledger, purpose="muon")
    parts = iter(received.split([math.prod(shape) for of_rank in shapes for shape in of_rank]))
    return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


def flops(shape: Shape) -> int:
    """Floating-point operations of `orthogonalise`: per iteration two products with the matrix and one of the gram."""
    short, long = min(shape), max(shape)
    return ITERATIONS * (4 * short * short * long + 2 * short**3)


def plan_buckets(shapes: Sequence[Shape], num_ranks: int, max_elements: int) -> list[list[tuple[int, int]]]:
    """Buckets of (index of the matrix, owner), in the order in which they are exchanged.

    Matrices go from the most work to the least, each to the rank that has the least work in the bucket, so equal ones
    go round robin. No rank owns more than `max_elements` in a bucket, unless it is one matrix.
    """
    buckets: list[list[tuple[int, int]]] = []
    work: list[int] = []
    held: list[int] = []
    for index in sorted(range(len(shapes)), key=lambda i: -flops(shapes[i])):
        size = shapes[index][0] * shapes[index][1]
        owner = work.index(min(work)) if buckets else 0
        if not buckets or (held[owner] and held[owner] + size > max_elements):
            buckets.append([])
            work, held, owner = [0] * num_ranks, [0] * num_ranks, 0
        buckets[-1].append((index, owner))
        work[owner] += flops(shapes[index])
        held[owner] += size
    return buckets
