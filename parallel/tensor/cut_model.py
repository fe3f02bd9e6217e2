"""Tensor parallelism with sequence parallelism: parameters cut to this rank's part, and communication at the seams.

Plain local parameters, not DTensors, whose dispatch costs more than the work of small layers and which cannot hold
uneven parts. Forward and backward move the residual stream (`tensor/stream.py`); after backward the gradients of what
several ranks hold alike must be summed (`tensor/replicas.py`). Source of the cuts: Shoeybi et al. 2019 (Megatron-LM).
"""

import torch
import torch.distributed as dist
from torch import nn

from armillary.comm.ledger import Ledger
from armillary.parallel.cut import Cut
from armillary.parallel.tensor.project import Enter, Pick
from armillary.parallel.tensor.stream import Leave, Stream
from armillary.parallel.tensor.vocabulary import VocabEmbedding, VocabHead


def cut_to_rank(model: nn.Module, cuts: dict[str, Cut], *, group: dist.ProcessGroup, ledger: Ledger) -> None:
    """Cuts a model, or one stage of it, to this rank's part, in place; names of parameters stay.

    Parameters become empty ones of the local shape, on their device (meta). Of a model cut for one rank nothing is
    changed. Hidden between blocks is then of `hidden_shape`, also what a stage gets and gives.

    Args:
        model: a `train.model.transformer.Transformer`, of which a pipeline may have removed blocks, embedding, norm
            and output.
        cuts: `tensor_cuts` of the whole model for the size of `group`.
        group: the tensor ranks, which are given the same tokens.
        ledger: counts activations for the purpose "tensor".
    """
    if group.size() == 1:
        return
    rank, stream = group.rank(), Stream(group, ledger)
    for name in [name for name, _ in model.named_parameters()]:
        layer, _, last = name.rpartition(".")
        _shrink(model.get_submodule(layer), last, cuts[name].local_shape(rank))
    for block in model.blocks.values():  # type: ignore[operator]
        for part, names in ((block.attention, ("query", "key", "value")), (block.ffn, ("gate", "up"))):
            picks = [Pick(getattr(part, name), number) for number, name in enumerate(names)]
            for name, pick in zip(names, picks, strict=True):
                setattr(part, name, pick)
            part.enter, part.leave = Enter(picks, stream), Leave(stream)
    if model.embedding is not None:
        first, _ = cuts["embedding.weight"].parts[rank]
        model.embedding = VocabEmbedding(model.embedding.weight, first, stream)  # type: ignore[arg-type,union-attr]
    if model.ends:
        model.head = VocabHead(cuts["embedding.weight" if model.output is None else "output.weight"], stream)


def _shrink(layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Puts an empty parameter of another shape in the place of `layer.name`."""
    old: nn.Parameter = getattr(layer, name)
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(layer, nn.Linear) and name == "weight":
        layer.out_features, layer.in_features = shape
