"""Sharded over any number of ranks, a model has the gradients of one process, and moves the bytes of the formula."""

import pytest
import torch

from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Partition, Plan
from armillary.train.build import build_engine
from armillary.train.config.run_config import RunConfig
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer, initialise
from armillary.train.optim.schedule import OptimConfig

# Rows that 2, 3 and 4 ranks do not divide: 101 embeddings, 42 channels, 6 key and value channels.
SHAPE = ModelConfig(dim=42, num_layers=2, num_heads=7, num_kv_heads=1, vocab_size=101, qkv_bias=True, ffn_dim=33)
LENGTH = 9


def sharded_step(rank: int, num_ranks: int, num_micro_batches: int, weights: str) -> tuple[float, dict[str, int], int]:
    ranks = make_ranks(Plan(dp=num_ranks), torch.device("cpu"))
    optim = OptimConfig(precision="float64")
    held = build_engine(RunConfig(model=SHAPE, optim=optim, partition=Partition(weights=weights)), ranks).held
    model = held.stages[0]
    one = Transformer(SHAPE).double()
    initialise(one, SHAPE.seed)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SHAPE.vocab_size, (num_ranks * num_micro_batches, LENGTH + 1), generator=generator)
    total = num_ranks * num_micro_batches * LENGTH
    for micro in range(num_micro_batches):
        row = tokens[rank * num_micro_batches + micro][None]
        if num_ranks > 1:
            model.set_requires_gradient_sync(micro == num_micro_batches - 1)
        (model(row[:, :-1], labels=row[:, 1:]) / total).backward()
    (one(tokens[:, :-1], labels=tokens[:, 1:]) / total).backward()
    moved = ranks.ledger.by_purpose()

    worst = 0.0
    for (name, mine), (other, expected) in zip(held.parameters().items(), one.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(held.whole(name, mine.detach(), torch.float64, "test"), expected.detach()), name
        difference = (held.whole(name, mine.grad, torch.float64, "test") - expected.grad).abs().max()
        worst = max(worst, float(difference / expected.grad.abs().max()))
    return worst, moved, predicted_bytes(one, num_ranks, num_micro_batches, weights)


def predicted_bytes(model: Transformer, num_ranks: int, num_micro_batches: int, weights: str) -> tuple[int, int]:
    """Bytes a rank sends: float64 weights gathered for forward and backward, gradients scattered once."""

    def padded(module: torch.nn.Module) -> int:
        rows = [(-(-p.shape[0] // num_ranks), p[0].numel()) for p in module.parameters()]
        return sum(count * width for count, width in rows) * 8 * (num_ranks - 1)

    blocks = sum(padded(block) for block in model.blocks.values())
    root = padded(torch.nn.ModuleList([model.embedding, model.norm]))
    # A block is gathered in each forward and, if it did not stay, again in each backward; the root always stays.
    return ((2 if weights == "all" else 1) * blocks + root) * num_micro_batches, blocks + root


CASES = [(1, 1, "all"), (2, 1, "all"), (3, 2, "all"), (3, 2, "rank"), (4, 1, "rank"), (5, 1, "all")]


@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "kept"), CASES)
def test_gradients_and_bytes(world, num_ranks, num_micro_batches, kept):
    for worst, moved, (weights, gradients) in world(sharded_step, num_ranks, num_ranks, num_micro_batches, kept):
        assert worst < 1e-12
        if num_ranks > 1:
            assert moved == {"weights": weights, "gradients": gradients}
        else:
            assert moved == {}
