"""`plan.verify`: before a run trains, its own ranks prove its plan on a small model of the same kind.

The same degrees, schedule, context strategies, partition, recompute, optimizer and grouping of heads; few layers, small
widths, short sequences, so that it costs the same however large the run. In float64, against one process on rank 0.
"""

import json
import time
from dataclasses import replace

import torch

from armillary.comm.ledger import Ledger
from armillary.parallel.mesh import Ranks
from armillary.train.config.run_config import RunConfig
from armillary.train.failure import RunStopped
from armillary.train.observe.observer import Observer
from armillary.train.optim.schedule import OptimConfig
from armillary.train.proof.parity import TOLERANCE, compare, trace_one_process, trace_ranks
from armillary.train.proof.specimen import specimen

STEPS = 2
"""The second shows what is wrong with the first one's update."""
LENGTHS = (9, 1, 14, 4, 30, 2, 7, 21, 3, 40, 5)
"""Tokens of the documents that are packed."""


def verify_plan(config: RunConfig, ranks: Ranks, observer: Observer, step: int) -> None:
    """Does what `plan.verify` asks for; tells the observer. Random state and ledger are left as they were.

    Args:
        config: nothing in its plan is left to be measured.
        step: where the run stands.

    Raises:
        RunStopped: on all ranks, if the plan does not compute what one process computes.
    """
    if config.plan.verify != "first-step":
        return
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        error, name = first_steps(small(config), replace(ranks, ledger=Ledger()))
    facts = {"error": error, "worst": name, "seconds": time.perf_counter() - began}
    against = f"against one process, {STEPS} steps of a small model in float64"
    if not error <= TOLERANCE["float64"]:
        message = (
            f"plan.verify: {config.plan} does not compute what one process computes: {name} is off by {error:.1e} "
            f"({against}; allowed {TOLERANCE['float64']:.0e}). Please report it with the run's config.toml; another "
            "plan may be right, and armillary parity tells"
        )
        observer.event(step, "unverified", message, **facts)
        raise RunStopped(message)
    took = f"{facts['seconds']:.1f} s"
    observer.event(step, "verified", f"verified: {config.plan} {against}: off by {error:.1e}, in {took}", **facts)


def first_steps(config: RunConfig, ranks: Ranks) -> tuple[float, str]:
    """The worst relative error of a config's first steps on its ranks, and the tensor that has it; agreed by all."""
    dataset = specimen(config.data, LENGTHS)
    trace = trace_ranks(config, dataset, STEPS, ranks)
    found = ""
    if ranks.rank == 0:
        errors = compare(trace, trace_one_process(config, dataset, STEPS))
        found = json.dumps([errors["worst_error"], errors["worst_name"]])
    error, name = json.loads(ranks.agree(found))
    return float(error), str(name)


def small(config: RunConfig) -> RunConfig:
    """The config of a small run of the same kind. What it costs does not grow with the run's model, only with its plan.

    Heads keep their grouping, and whether tensor ranks share key heads; they are halved, together, down to 8 or what
    the tensor ranks need. Heads are 4 wide, hidden 36, the feed-forward 24 or one channel a rank. A stage has one layer
    (two where the plan's own numbers give it more), a model two at least; a context rank about 6 tokens of a sequence;
    a data rank one sequence a micro-batch, one of them two; micro-batches are at most 4, or twice the pipeline's ranks.
    Compiled blocks are not compiled: that alone would take longer than a small run may.
    """
    plan, model = config.plan, config.model
    heads, keys = _few_heads(model.num_heads, model.kv_heads, plan.tp)
    layers = tuple(min(number, 2) for number in plan.layers)
    length = min(config.data.sequence_length, max(13, 6 * plan.cp + 1))
    micro_batches = min(config.optim.micro_batches, max(4, 2 * plan.pp))
    batch_size = min(config.data.batch_size, plan.dp * micro_batches + 1)
    shape = replace(
        model,
        dim=36,
        num_layers=sum(layers) or max(2, plan.num_stages),
        num_heads=heads,
        num_kv_heads=keys,
        head_dim=4,
        ffn_dim=max(24, plan.tp),
        vocab_size=261,
        window=min(model.window, length // 2) if model.window else None,
        weights="",
    )
    return replace(
        config,
        model=shape,
        data=replace(config.data, sequence_length=length, batch_size=batch_size, held_out=0.0),
        optim=OptimConfig(
            kind=config.optim.kind,
            precision="float64",
            micro_batches=micro_batches,
            learning_rate=1e-2,
            clip_norm=0.5,
            schedule="constant",
        ),
        plan=replace(plan, layers=layers, compile=False, verify=""),
    )


def _few_heads(heads: int, keys: int, degree: int) -> tuple[int, int]:
    while heads > 8 and heads % 2 == keys % 2 == 0 and heads // 2 >= degree:
        if (keys // 2 >= degree) != (keys >= degree):
            break
        heads, keys = heads // 2, keys // 2
    return heads, keys
