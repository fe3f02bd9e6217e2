"""Weights, gradients and optimizer state as DeepSpeed's ZeRO holds them, and as shards of whole rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from armillary.parallel.cut import Cut
from armillary.parallel.mesh import Ranks
from armillary.train.deepspeed.layout import Pieces, Span, pieces_of_each, pieces_of_one_flat, redistribute

WEIGHTS, GRADIENTS = "weights", "gradients"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, shaped as their parameter."""


class ZeroState:
    """The flat partitions of one rank. Rows are those that FSDP2 would give the rank, so checkpoints are the same."""

    def __init__(self, optimizer: Any, names: Mapping[Tensor, str], cuts: Mapping[str, Cut], ranks: Ranks) -> None:
        """
        Args:
            optimizer: DeepSpeed's, around torch's AdamW.
            names: of the model's parameters.
            cuts: how the tensor ranks divide each.
        """
        self.optimizer, self.ranks = optimizer, ranks
        self._shown: dict[str, dict[str, Tensor]] = {}
        self.ready = False
        """Whether there are gradients of a whole step."""
        self.shards_weights = hasattr(optimizer, "fp32_partitioned_groups_flat")
        count = ranks.plane.size()
        self.where: dict[str, tuple[int, Pieces]] = {}
        for index, group in enumerate(self._groups()):
            if self.shards_weights:
                pieces = pieces_of_each([parameter.ds_numel for parameter in group], count)
            else:
                sizes = [parameter.numel() for parameter in group]
                offsets = optimizer.round_robin_bit16_offsets[index]
                pieces = pieces_of_one_flat(sizes, offsets, int(optimizer.partition_size[index]), count)
            self.where |= {names[p]: (index, it) for p, it in zip(group, pieces, strict=True)}
        tensor_rank = ranks.tensor.rank()
        self.cuts = {name: cuts[name] for name in names.values()}
        self.targets = {name: _rows(cut, tensor_rank, count) for name, cut in self.cuts.items()}
        self.shapes = {
            name: cut.shard(tensor_rank, ranks.plane.get_local_rank(), count)[1] for name, cut in self.cuts.items()
        }

    def _groups(self) -> list[list[Any]]:
        """The model's parameters, group by group, in the order in which they lie in the flat partitions."""
        return self.optimizer.fp16_groups if self.shards_weights else self.optimizer.round_robin_bit16_groups

    def masters(self) -> list[Tensor]:
        """This rank's weights, flat, by group: float32, or float64 for a float64 model."""
        if self.shards_weights:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def gradients(self) -> list[Tensor]:
        """This rank's gradients, flat, by group: the memory itself."""
        assert self.ready
        if not self.shards_weights:
            # By index: DeepSpeed adds the groups in the order in which backward comes to them.
            return [self.optimizer.averaged_gradients[index][0] for index in range(len(self.masters()))]
        sizes = [int(size) for size in self.optimizer.fp16_partitioned_groups_flat_numel]
        return list(self.optimizer.grad_partitions_flat_buffer.split(sizes))

    def settle(self) -> None:
        """After the last backward pass of a step: gradients are flat, and can be worked with."""
        if not self.shards_weights:
            for index, parts in self.optimizer.averaged_gradients.items():
                flat = getattr(parts, "flat_partition", None)
                if flat is None:
                    flat = torch.cat([part.reshape(-1) for part in parts])
                self.optimizer.averaged_gradients[index] = [flat]
        self.ready = True
        self._shown.clear()

    def changed(self) -> None:
        """After a step: its gradients are used up, and the rows that were shown are of yesterday."""
        self.ready = False
        self._shown.clear()

    def drop(self) -> None:
        """Forgets the gradients of a step that is not to be taken."""
        self.optimizer.zero_grad()
        if self.shards_weights:
            self.optimizer.averaged_gradients = {}
        else:
            for index in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[index] = None
                self.optimizer.all_grad_tensors[index] = None
            self.optimizer.micro_step_id = -1
        self.changed()

    def state_of(self, flat: Tensor) -> dict[str, Any]:
        """The optimizer's state of a partition."""
        return self.optimizer.optimizer.state[flat]

    def create_state(self) -> None:
        """Allocates the zero state that AdamW would begin with, where there is none yet."""
        for flat in self.masters():
            if not self.state_of(flat):
                count = torch.zeros((), dtype=torch.float32, device=flat.device)
                moments = {key: torch.zeros_like(flat) for key in MOMENTS}
                self.state_of(flat).update(step=count, **moments)

    def flats(self, kind: str) -> list[Tensor]:
        """By group: weights, gradients or a moment."""
        if kind == WEIGHTS:
            return [flat.detach() for flat in self.masters()]
        return self.gradients() if kind == GRADIENTS else [self.state_of(flat)[kind] for flat in self.masters()]

    @torch.no_grad()
    def pull(self, kind: str) -> dict[str, Tensor]:
        """This rank's rows of each parameter's weights, gradient or moment: a copy. All ranks of the plane call it."""
        pieces = self._pieces(kind)
        rows = {name: pieces[name].new_empty(shape) for name, shape in self.shapes.items()}
        flat = [rows[name].view(-1) for name in self.where]
        sources, targets = self._spans()
        redistribute(sources, targets, list(pieces.values()), flat, **self._facts(kind))
        return rows

    @torch.no_grad()
    def push(self, kind: str, rows: Mapping[str, Tensor]) -> None:
        """Puts rows back to where DeepSpeed has them. All ranks of the plane call it."""
        sources, targets = self._spans()
        outgoing = [rows[name].reshape(-1) for name in self.where]
        redistribute(targets, sources, outgoing, list(self._pieces(kind).values()), **self._facts(kind))

    @torch.no_grad()
    def spread(self) -> None:
        """Brings the masters' values to the weights that forward and backward use."""
        if not self.shards_weights:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for index in range(len(self.masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def shown(self, kind: str) -> dict[str, Tensor]:
        """As `pull`, the same rows until something changes them. All ranks of the plane call it."""
        if kind not in self._shown:
            self._shown[kind] = self.pull(kind)
        return self._shown[kind]

    def take_over(self) -> None:
        """Makes what now stands in the rows that were shown the weights and moments. All ranks of the plane call it."""
        for kind, rows in self._shown.items():
            if kind != GRADIENTS:
                self.push(kind, rows)
        self.spread()
        self.changed()

    def counted_gradients(self) -> list[Tensor]:
        """The flat gradients that this rank counts: over all ranks, each element of the model once."""
        if self.ranks.tensor.size() == 1:
            return self.gradients()
        rank = self.ranks.tensor.rank()
        return [piece for name, piece in self._pieces(GRADIENTS).items() if self.cuts[name].speaks(rank)]

    def _pieces(self, kind: str) -> dict[str, Tensor]:
        """This rank's piece of each parameter: views."""
        flats, me = self.flats(kind), self.ranks.plane.get_local_rank()
        found = {}
        for name, (index, pieces) in self.where.items():
            (first, last), position = pieces.spans[me], pieces.positions[me]
            found[name] = flats[index].narrow(0, position if last > first else 0, last - first)
        return found

    def _spans(self) -> tuple[list[tuple[Span, ...]], list[tuple[Span, ...]]]:
        return [pieces.spans for _, pieces in self.where.values()], [self.targets[name] for name in self.where]

    def _facts(self, kind: str) -> dict[str, Any]:
        return {"group": self.ranks.plane.get_group(), "ledger": self.ranks.ledger, "purpose": f"rows of {kind}"}


def _rows(cut: Cut, tensor_rank: int, count: int) -> tuple[Span, ...]:
    """The elements of a tensor rank's part that are in each plane rank's rows."""
    size = 1
    for extent in cut.local_shape(tensor_rank)[1:]:
        size *= extent
    own = cut.box(tensor_rank)[0][0]
    spans = []
    for index in range(count):
        offsets, sizes = cut.shard(tensor_rank, index, count)
        first = (offsets[0] - own) * size
        spans.append((first, first + sizes[0] * size))
    return tuple(spans)
