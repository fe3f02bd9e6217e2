"""What `armillary bench compose` measures: sizes, plans, and the batches of every step. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from armillary.parallel.plan import Plan
from armillary.train.config.run_config import RunConfig
from armillary.train.data.config import DataConfig
from armillary.train.data.dataset import Batch
from armillary.train.model.shape import ModelConfig
from armillary.train.optim.schedule import OptimConfig


@dataclass(frozen=True)
class Size:
    """Of the model and of a step's batch."""

    dim: int
    num_layers: int
    num_heads: int
    seq: int
    batch: int
    vocab_size: int
    steps: int
    """Steps in a turn, whose mean is one measurement."""


SIZES = {
    "small": Size(dim=64, num_layers=4, num_heads=4, seq=64, batch=8, vocab_size=512, steps=4),
    "medium": Size(dim=256, num_layers=4, num_heads=8, seq=256, batch=8, vocab_size=4096, steps=1),
}
PLANS = {
    "FSDP": "dp=4",
    "FSDP x TP": "dp=2,tp=2",
    "FSDP x PP": "pp=2,dp=2",
    "FSDP x PP zbv": "pp=2,dp=2,schedule=zbv",
    "PP x TP": "pp=2,tp=2",
    "FSDP x PP x TP": "pp=2,dp=2,tp=2",
}
MICRO_BATCHES = 4
"""With a pipeline. Without one there is nothing to fill."""


@dataclass(frozen=True)
class Case:
    """One measurement: a plan on a size, and whether the same is assembled by hand beside it."""

    name: str
    plan: str
    size: Size
    by_hand: bool = True

    def config(self) -> RunConfig:
        """float32 throughout, AdamW at a constant rate, as many layers on each stage."""
        size, fields = self.size, plan_fields(self.plan)
        plan = Plan(**fields)
        if plan.pp > 1:
            plan = Plan(**fields, layers=even_layers(size.num_layers, plan.num_stages))
        return RunConfig(
            model=ModelConfig(
                dim=size.dim,
                num_layers=size.num_layers,
                num_heads=size.num_heads,
                vocab_size=size.vocab_size,
                tie_embeddings=False,
            ),
            data=DataConfig(sequence_length=size.seq, batch_size=size.batch),
            optim=OptimConfig(
                precision="float32",
                schedule="constant",
                steps=10**6,
                micro_batches=MICRO_BATCHES if plan.pp > 1 else 1,
            ),
            plan=plan,
        )


@dataclass(frozen=True)
class Work:
    """What the ranks measure: cases that are all for as many ranks, and how often each side takes its turn."""

    cases: tuple[Case, ...]
    repetitions: int


def plan_fields(text: str) -> dict[str, Any]:
    """The fields of a plan as `--plan` has them: "pp=2,schedule=zbv"."""
    pairs = [part.split("=") for part in text.split(",") if part]
    return {key: int(value) if value.isdecimal() else value for key, value in pairs}


def even_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, the first ones with one more where they do not come out even.

    >>> even_layers(5, 2)
    (3, 2)
    """
    each, over = divmod(num_layers, num_stages)
    return tuple(each + (stage < over) for stage in range(num_stages))


def num_ranks(case: Case) -> int:
    return Plan(**plan_fields(case.plan)).num_ranks


def cases(size: str, plans: list[str]) -> list[Case]:
    """The cases beside peers.

    Args:
        size: a name of `SIZES`.
        plans: names of `PLANS`.
    """
    return [Case(f"{name}, {size}", PLANS[name], SIZES[size]) for name in plans]


def growth_cases() -> list[Case]:
    """Ours alone: more ranks on one batch (strong) and on a batch that grows with them (weak), longer sequences of as
    many tokens, wider models."""
    base = SIZES["medium"]
    found = []
    for ranks in (1, 2, 4, 8):
        found.append(Case(f"strong, {ranks} ranks", f"dp={ranks}", base, by_hand=False))
        found.append(Case(f"weak, {ranks} ranks", f"dp={ranks}", replace(base, batch=2 * ranks), by_hand=False))
    for name in ("tp=2,dp=2", "cp=2,dp=2,context=ring"):
        for seq in (128, 512, 1024):
            size = replace(base, seq=seq, batch=2048 // seq)
            found.append(Case(f"{name}, sequence {seq}", name, size, by_hand=False))
        for dim in (128, 256, 384):
            found.append(Case(f"{name}, width {dim}", name, replace(base, dim=dim, num_heads=dim // 32), by_hand=False))
    return found


def tokens_of_step(case: Case, step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (sequences of data rank `rank`, seq), int64, drawn at random: one document a row, all
    labelled."""
    size, ranks = case.size, Plan(**plan_fields(case.plan)).dp
    drawn = np.random.default_rng(step).integers(0, size.vocab_size, (size.batch, size.seq + 1))
    own = drawn[rank * size.batch // ranks : (rank + 1) * size.batch // ranks]
    return np.ascontiguousarray(own[:, :-1]), np.ascontiguousarray(own[:, 1:])


def batches_of(tokens: np.ndarray, labels: np.ndarray, micro_batches: int) -> list[Batch]:
    """The same as our engine takes them."""
    rows = len(tokens) // micro_batches
    positions = np.broadcast_to(np.arange(tokens.shape[1]), (rows, tokens.shape[1]))
    documents = np.zeros((rows, tokens.shape[1]), np.int32)
    parts = (slice(number * rows, (number + 1) * rows) for number in range(micro_batches))
    return [Batch(tokens[part], labels[part], positions, documents) for part in parts]
