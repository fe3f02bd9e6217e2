"""Pipelines beside one process: small models in float64, micro-batches of unlike shapes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from armillary.comm.ledger import Ledger
from armillary.kernels.attention.places import Places
from armillary.parallel.pipeline.cut_model import cut_to_stage
from armillary.parallel.pipeline.mail import PURPOSE, bytes_sent
from armillary.parallel.pipeline.runner import Pipeline
from armillary.parallel.runner import Part
from armillary.parallel.schedule.actions import Schedule
from armillary.parallel.schedule.by_name import schedule_named
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import IGNORE, Transformer, initialise

DIM, VOCAB = 16, 24


@dataclass(frozen=True)
class Case:
    """A schedule, a model and its micro-batches."""

    schedule: str = "1f1b"
    num_parts: int = 4
    tied: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    packed: bool = True
    recompute: str = "none"
    overlap: bool = False
    steps: int = 2
    stages_per_rank: int = 0

    def plan(self, num_ranks: int) -> Schedule:
        return schedule_named(self.schedule, num_ranks, self.num_parts, self.stages_per_rank)


def whole_model(case: Case, num_stages: int) -> Transformer:
    config = ModelConfig(
        dim=DIM,
        num_layers=num_stages + 1,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=32,
        vocab_size=VOCAB,
        tie_embeddings=case.tied,
        qk_norm=case.qk_norm,
        qkv_bias=case.qkv_bias,
    )
    model = Transformer(config).to(torch.float64)
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Ones and zeros would hide gradients that go astray; small weights those of attention.
            parameter.copy_(parameter * 4 + 0.1 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    for block in model.blocks.values():
        block.recompute = case.recompute
    return model


def layers_of(stage: int, num_stages: int) -> range:
    """One a stage, and two in the first: the model has one layer more than stages."""
    return range(2) if stage == 0 else range(stage + 1, stage + 2)


def parts_of(case: Case, step: int, copy_number: int = 0) -> list[Part]:
    """Micro-batches of unlike shapes; the second of one token without a label, the fifth without tokens."""
    generator = np.random.default_rng([step, copy_number])
    parts = []
    for number in range(case.num_parts):
        batch, seq = (1, 1) if number == 1 else (1 + number % 3, 5 + 3 * ((number + step + copy_number) % 4))
        seq = 0 if number == 4 else seq
        tokens = generator.integers(0, VOCAB, (batch, seq))
        labels = np.where(generator.random((batch, seq)) < 0.2, IGNORE, generator.integers(0, VOCAB, (batch, seq)))
        documents = np.sort(generator.integers(0, 3, (batch, seq)), axis=1) * case.packed
        starts = np.stack([np.searchsorted(row, row) for row in documents])
        places = Places.of(np.arange(seq)[None] - starts, documents)
        if number == 1:
            labels = np.full((1, 1), IGNORE)
        parts.append(Part(torch.from_numpy(tokens), torch.from_numpy(labels), places))
    return parts


def hidden(places: Places) -> tuple[int, ...]:
    return (places.batch, places.seq, DIM)


def alone(case: Case, num_stages: int, copies: int = 1) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Losses of the steps, sums of an evaluation, gradients of all steps together, of one process."""
    model = whole_model(case, num_stages)
    losses, sums = [], []
    for step in range(case.steps):
        parts = [part for number in range(copies) for part in parts_of(case, step, number)]
        results = [model(part.tokens, part.places, part.labels) for part in parts]
        loss = sum(results, torch.zeros((), dtype=torch.float64)) / divisor_of(step)
        loss.backward()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        sums = [float(model(part.tokens, part.places, part.labels)) for part in parts_of(case, case.steps)]
    return losses, sums, {name: gradient_of(p).numpy() for name, p in model.named_parameters()}


def divisor_of(step: int) -> Tensor:
    return torch.tensor(7 + step)


def gradient_of(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    gradient = parameter.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def stages_of(case: Case, schedule: Schedule, rank: int) -> list[Transformer]:
    whole, num = whole_model(case, schedule.num_stages), schedule.num_stages
    stages = []
    for stage in schedule.stages_of(rank):
        model = copy.deepcopy(whole)
        cut_to_stage(model, layers_of(stage, num), stage == 0, stage == num - 1)
        stages.append(model)
    return stages


def pipeline_of(
    case: Case,
    ledger: Ledger,
    group: dist.ProcessGroup | None = None,
    prepare: Callable[[Transformer], None] = lambda stage: None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Pipeline, list[Transformer]]:
    """This rank's part of a case's pipeline, and its stages, which `prepare` has changed."""
    group = group or dist.group.WORLD
    schedule = case.plan(group.size())
    stages = stages_of(case, schedule, group.rank())
    for stage in stages:
        prepare(stage)
    where = {"group": group, "ledger": ledger, "device": torch.device("cpu")}
    return Pipeline(stages, schedule, dtype=dtype, hidden=hidden, overlap=case.overlap, **where), stages


def on_rank(rank: int, case: Case) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """What `alone` gives, of one rank's stages; checks bytes and that nothing is left."""
    ledger = Ledger()
    return run_pipeline(case, *pipeline_of(case, ledger), ledger, rank)


def run_pipeline(
    case: Case, pipeline: Pipeline, stages: list[Transformer], ledger: Ledger, rank: int, copy_number: int = 0
) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    losses = []
    for step in range(case.steps):
        parts = parts_of(case, step, copy_number)
        before = ledger.bytes(PURPOSE)
        losses.append(float(pipeline.forward_backward(parts, divisor_of(step))))
        want = bytes_sent(pipeline.schedule.stage_ranks, [hidden(part.places) for part in parts], torch.float64)
        assert ledger.bytes(PURPOSE) - before == want[rank], (ledger.bytes(PURPOSE) - before, want)
        assert pipeline.is_clear
    sums = [float(pipeline.loss(part)) for part in parts_of(case, case.steps)]
    assert pipeline.is_clear
    pipeline.reshard()
    gradients: dict[str, np.ndarray] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is None:
                continue
            gradients[name] = gradients.get(name, 0) + gradient_of(parameter).numpy()
    return losses, sums, gradients


def problems(
    found: list[tuple[list[float], list[float], dict[str, np.ndarray]]], case: Case, num_stages: int, copies: int = 1
) -> list[str]:
    """Where what the ranks found together is not what one process finds."""
    losses, sums, gradients = alone(case, num_stages, copies)
    wrong = []
    for title, place, truth in (("loss", 0, losses), ("evaluation", 1, sums)):
        for number, want in enumerate(truth):
            got = sum(results[place][number] for results in found)  # type: ignore[misc]
            if not abs(got - want) < 1e-10:
                wrong.append(f"{title} {number}: {got} is not {want}")
    for name, want in gradients.items():
        parts = [results[2][name] for results in found if name in results[2]]
        error = np.abs(sum(parts) - want).max() if parts else np.inf
        if not error < 1e-10 or not np.abs(want).max() > 1e-6:
            wrong.append(f"gradient of {name} is off by {error:.1e}, on {len(parts)} stages")
    return wrong
