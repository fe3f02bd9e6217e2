"""What each rank of `armillary bench compose` runs: case after case, ours and the one by hand in turns."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from armillary.launch.bench.compose_cases import Case, Work, batches_of, tokens_of_step
from armillary.launch.bench.on_ranks import serve
from armillary.parallel.mesh import Ranks, joined_ranks, make_ranks
from armillary.parallel.plan import Plan
from armillary.train.build import build_engine

Step = Callable[[int], tuple[float, float]]
"""The step of this number: loss of all ranks, and the gradient's norm."""
WARM_UP = 3
"""Steps of each side before the turns, in which losses and norms are compared."""
AGREEMENT = 1e-5
"""Relative difference of losses, in float32, at which both sides do the same work; ten times this for norms."""


def ours(case: Case, ranks: Ranks) -> Step:
    """A trainer's step on given batches."""
    config = case.config()
    engine = build_engine(config, ranks)

    def step(number: int) -> tuple[float, float]:
        ranks.ledger.clear()
        tokens, labels = tokens_of_step(case, number, ranks.data.rank())
        loss = engine.forward_backward(batches_of(tokens, labels, config.optim.micro_batches)).item()
        norm = engine.gradient_norm()
        result = loss, norm.item()
        engine.clip(norm, config.optim.clip_norm)
        engine.optimizers.step(1.0)
        engine.optimizers.zero_grad()
        return result

    return step


def by_hand(case: Case, ranks: Ranks) -> Step:
    """The same, assembled from torch's pieces."""
    # Here, since it loads all of torch's parallelisms.
    from armillary.launch.bench.compose_peer import ByHand

    model = ByHand(case.config(), ranks)

    def step(number: int) -> tuple[float, float]:
        tokens, labels = tokens_of_step(case, number, ranks.data.rank())
        return model.step(torch.from_numpy(tokens), torch.from_numpy(labels))

    return step


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """This rank's figures of a case: of each side wall and processor seconds, a step, of every turn; and our bytes."""
    ranks = make_ranks(case.config().plan, torch.device("cpu"))
    sides = {"ours": ours(case, ranks)}
    if case.by_hand:
        sides["by hand"] = by_hand(case, ranks)
    results = {name: [step(number) for number in range(WARM_UP)] for name, step in sides.items()}
    difference = compare(case.name, results["ours"], results["by hand"]) if case.by_hand else 0.0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repetition in range(repetitions):
        for name in names if repetition % 2 == 0 else names[::-1]:
            first = WARM_UP + repetition * case.size.steps
            dist.barrier(ranks.everyone)
            began, spent = time.perf_counter(), time.process_time()
            for number in range(first, first + case.size.steps):
                sides[name](number)
            # Until the last rank is through: a step is as long as the slowest takes.
            dist.barrier(ranks.everyone)
            seconds[name].append((time.perf_counter() - began) / case.size.steps)
            processor[name].append((time.process_time() - spent) / case.size.steps)
    if ranks.rank == 0:
        told = ", ".join(f"{name} {statistics.median(times) * 1e3:.0f} ms" for name, times in seconds.items())
        print(f"{case.name}: {told}", file=sys.stderr, flush=True)
    moved = {purpose: number for purpose, number in ranks.ledger.by_purpose().items() if number}
    return {
        "seconds": seconds,
        "processor": processor,
        "bytes": moved,
        "calls": sum(entry.calls for entry in ranks.ledger.entries.values()),
        "difference": difference,
        "load": os.getloadavg(),
    }


def compare(name: str, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """The largest relative difference of the losses.

    Raises:
        RuntimeError: if the two sides do not compute the same.
    """
    pairs = list(zip(ours, theirs, strict=True))
    losses = max(abs(a - b) / abs(b) for (a, _), (b, _) in pairs)
    norms = max(abs(a - b) / abs(b) for (_, a), (_, b) in pairs)
    if not (losses <= AGREEMENT and norms <= 10 * AGREEMENT):
        raise RuntimeError(f"{name}: ours and by hand differ in (loss, norm of the gradient): {ours} and {theirs}")
    return losses


def figures(work: Work) -> list[dict[str, Any]]:
    """Of this rank, for each case."""
    with joined_ranks(Plan(dp=int(os.environ["WORLD_SIZE"])), torch.device("cpu")):
        return [measure(case, work.repetitions) for case in work.cases]


if __name__ == "__main__":
    serve(figures, Work)
