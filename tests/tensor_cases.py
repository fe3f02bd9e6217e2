"""What the tests of tensor parallelism share: one case computed by one process, and on one of several tensor ranks."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.ledger import Ledger
from armillary.kernels.attention.places import Places
from armillary.parallel.cut import Cut
from armillary.parallel.held import part_of
from armillary.parallel.tensor.cut_model import cut_to_rank
from armillary.parallel.tensor.cuts import tensor_cuts
from armillary.parallel.tensor.replicas import sum_replicas
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import IGNORE, Transformer, initialise


@dataclass(frozen=True)
class Case:
    """A model and a batch. Sizes are odd where they can be."""

    heads: tuple[int, int] = (4, 2)
    vocab: int = 37
    hidden: int = 13
    tied: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    grid: tuple[int, int] = (3, 7)
    recompute: str = "none"
    labels: str = "some"
    """all, some or none of the tokens have one."""
    packed: bool = False

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            dim=10,
            num_layers=2,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=4,
            ffn_dim=self.hidden,
            vocab_size=self.vocab,
            tie_embeddings=self.tied,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
        )

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels (batch, seq), the same on every rank."""
        drawn = torch.randint(self.vocab, (2, *self.grid), generator=torch.Generator().manual_seed(3))
        share = {"all": 0.0, "some": 0.4, "none": 1.1}[self.labels]
        ignored = torch.rand(self.grid, generator=torch.Generator().manual_seed(4)) < share
        return drawn[0], drawn[1].masked_fill(ignored, IGNORE)

    def places(self) -> Places:
        batch, seq = self.grid
        if not self.packed:
            return Places.in_order(batch, seq)
        first = seq // 3
        positions = np.concatenate([np.arange(first), np.arange(seq - first)])[None].repeat(batch, 0)
        return Places.of(positions, (np.arange(seq) >= first).astype(int)[None].repeat(batch, 0))


@dataclass
class Result:
    """What one process or all ranks together computed."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def weights_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole parameters in which nothing is alike: norms and biases are drawn too."""
    model = Transformer(case.config)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}


def make(case: Case, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(case.config).to(dtype)
    for block in model.blocks.values():
        block.recompute = case.recompute
    return model


def compute(model: Transformer, case: Case) -> Result:
    tokens, labels = case.tokens()
    with torch.no_grad():
        logits = model(tokens, case.places())
    loss = model(tokens, case.places(), labels)
    loss.backward()
    return Result(loss.detach(), logits, {name: p.grad for name, p in model.named_parameters()})


def alone(case: Case, dtype: torch.dtype = torch.float64) -> Result:
    model = make(case, dtype).to_empty(device="cpu")
    model.load_state_dict(weights_of(case, dtype))
    return compute(model, case)


def on_rank(
    case: Case, ledger: Ledger, dtype: torch.dtype = torch.float64, group: dist.ProcessGroup | None = None
) -> tuple[Result, dict[str, Cut]]:
    """This rank's result, its gradients local parts; replicas are summed."""
    group = group or dist.group.WORLD
    assert group is not None
    model = make(case, dtype)
    cuts = tensor_cuts(model, group.size())
    cut_to_rank(model, cuts, group=group, ledger=ledger)
    fill(model, weights_of(case, dtype), cuts, group.rank())
    result = compute(model, case)
    sum_replicas(result.gradients, cuts, group=group, ledger=ledger)
    return result, cuts


@torch.no_grad()
def fill(model: torch.nn.Module, weights: dict[str, Tensor], cuts: dict[str, Cut], rank: int) -> None:
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(part_of(weights[name], cuts[name].box(rank)))


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest value, or of a thousandth where all are zero but for rounding."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not got.numel():
        return 0.0
    largest = float(want.abs().max())
    return float((got - want).abs().max()) / max(largest, 1e-3)
