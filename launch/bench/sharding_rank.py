"""One rank of `armillary bench sharding`: the contenders take turns on the same model, batches and ranks."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.comm.collectives import all_reduce
from armillary.comm.ledger import Ledger
from armillary.kernels.attention.places import Places
from armillary.launch.bench.on_ranks import serve
from armillary.launch.bench.sharding import OURS, Work
from armillary.parallel.mesh import Ranks, joined_ranks
from armillary.parallel.plan import Partition, Plan
from armillary.parallel.zero import ZeroConfig
from armillary.train.build import COMPUTE, build_engine
from armillary.train.config.run_config import RunConfig
from armillary.train.data.dataset import Batch
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer, initialise
from armillary.train.optim.optimizers import optimizers_of
from armillary.train.optim.schedule import OptimConfig

SEQUENCES, TOKENS = 16, 256
MODEL = ModelConfig(dim=128, num_layers=4, num_heads=4, vocab_size=4096)
"""The demo's."""

Step = Callable[[], float]
"""A whole step, which returns this rank's view of the loss."""


def batch_of(ranks: Ranks) -> Batch:
    """This rank's sequences: random tokens, one document a row."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, MODEL.vocab_size, (SEQUENCES, TOKENS + 1))
    own = slice(ranks.rank, None, ranks.num_ranks)
    positions = np.broadcast_to(np.arange(TOKENS), (SEQUENCES, TOKENS))
    return Batch(tokens[own, :-1].copy(), tokens[own, 1:].copy(), positions[own].copy(), positions[own] * 0)


def our_step(config: RunConfig, ranks: Ranks) -> Step:
    """What the trainer does, without its data, guard and metrics."""
    engine = build_engine(config, ranks)
    batch = batch_of(ranks)

    def step() -> float:
        loss = engine.forward_backward([batch])
        engine.clip(engine.gradient_norm(), config.optim.clip_norm)
        engine.optimizers.step(1.0)
        engine.optimizers.zero_grad()
        return loss.item()

    return step


def inputs_of(ranks: Ranks) -> tuple[Tensor, Places, Tensor, float]:
    """Arguments of the model, and what a rank divides its sum by so that the mean over ranks is the global mean."""
    batch = batch_of(ranks)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    return tokens, Places.of(batch.positions, batch.documents), labels, SEQUENCES * TOKENS / ranks.num_ranks


def bare_fsdp2_step(config: RunConfig, ranks: Ranks) -> Step:
    """What one would write by hand with torch alone."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    optim = config.optim
    model = Transformer(config.model)
    initialise(model, config.model.seed)
    policy = MixedPrecisionPolicy(COMPUTE[optim.precision], torch.float32, cast_forward_inputs=False)
    for block in model.blocks.values():
        fully_shard(block, mesh=ranks.plane, mp_policy=policy)
    fully_shard(model, mesh=ranks.plane, mp_policy=policy)
    optimizer = _adamw(model, optim)
    tokens, places, labels, divisor = inputs_of(ranks)

    def step() -> float:
        loss = model(tokens, places, labels) / divisor
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss.detach(), ranks)

    return step


def deepspeed_step(config: RunConfig, ranks: Ranks) -> Step:
    """DeepSpeed's ZeRO-3 as its own documentation has it, with its own defaults."""
    import deepspeed
    from deepspeed.comm import comm

    optim = config.optim
    model = Transformer(config.model)
    initialise(model, config.model.seed)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": optim.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    comm.cdb = None  # its own communication, not the one that counts
    optimizer = _adamw(model, optim)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    tokens, places, labels, divisor = inputs_of(ranks)

    def step() -> float:
        loss = engine(tokens, places, labels) / divisor
        engine.backward(loss)
        engine.step()
        return _mean(loss.detach(), ranks)

    return step


def _adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """torch's, fused, with the decay that everybody has, so that all come to the same losses."""
    return optimizers_of(dict(model.named_parameters()), optim).optimizers[0]


def _mean(loss: Tensor, ranks: Ranks) -> float:
    all_reduce(loss, group=ranks.everyone, ledger=Ledger(), purpose="loss")
    return loss.item() / ranks.num_ranks


def figures(work: Work) -> dict[str, Any]:
    """Of this rank: `seconds` a step by contender, one a round; `bytes` a step sends; `losses`, the last."""
    with joined_ranks(Plan(dp=int(os.environ["WORLD_SIZE"])), torch.device("cpu")) as ranks:
        return measure(work, ranks)


def measure(work: Work, ranks: Ranks) -> dict[str, Any]:
    optim = OptimConfig(precision=work.precision, steps=10**6, learning_rate=1e-3)  # type: ignore[arg-type]
    config = RunConfig(model=MODEL, optim=optim, plan=Plan(dp=ranks.num_ranks))
    zero = replace(config, zero=ZeroConfig(engine="deepspeed"))
    kept = replace(config, partition=Partition(weights="rank"))
    contenders: dict[str, Step] = {
        OURS: our_step(config, ranks),
        f'{OURS}, partition.weights = "rank"': our_step(kept, ranks),
        f'{OURS}, zero.engine = "deepspeed"': our_step(zero, ranks),
        "DeepSpeed ZeRO-3": deepspeed_step(config, ranks),
        "bare FSDP2": bare_fsdp2_step(config, ranks),
    }
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent, losses = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    for repetition in range(work.repetitions + 1):
        start = repetition % len(names)
        for name in names[start:] + names[:start]:
            ranks.ledger.clear()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(work.steps):
                losses[name] = contenders[name]()
            taken = (time.perf_counter() - began) / work.steps
            sent[name] = ranks.ledger.bytes() // work.steps
            if repetition > 0:
                seconds[name].append(taken)
    return {"seconds": seconds, "bytes": sent, "losses": losses}


if __name__ == "__main__":
    serve(figures, Work)
