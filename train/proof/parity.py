"""Parity: the proof that a plan computes what one process computes.

Both run the same batches from the same initial weights for a few optimizer steps. The ranks run the very code of a
training run. The one process is the oracle, and is written as plainly as it can be: no ranks, no sharding, no
micro-batches, one sequence after the other. In float64 rounding cannot hide a mistake: an error above 1e-9 is one.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention.places import Places
from armillary.parallel.held import Held
from armillary.parallel.mesh import Ranks, joined_ranks
from armillary.train.build import build_engine
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.data.dataset import Dataset, micro_batches, prepare
from armillary.train.failure import guarded, leave
from armillary.train.model.transformer import IGNORE, Transformer, initialise
from armillary.train.optim.optimizers import optimizers_of
from armillary.train.optim.schedule import learning_rate_ratio
from armillary.train.precision import COMPUTE, weights_dtype
from armillary.train.resolve import resolve

Trace = dict[str, Tensor]
"""Named results of a run: `loss/<step>`, `gradient/<step>/<parameter>`, `parameter/<parameter>`, all whole."""

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative error that is rounding, by dtype."""


def trace_one_process(config: RunConfig, dataset: Dataset, steps: int) -> Trace:
    """The oracle: the run on this process alone. Weights are float32 at least, and so are sums of gradients; each pass
    works on a copy of the weights in the dtype of the config."""
    compute = COMPUTE[config.optim.precision]
    weights = Transformer(config.model).to(torch.float64 if compute == torch.float64 else torch.float32)
    initialise(weights, config.model.seed)
    optimizers = optimizers_of(dict(weights.named_parameters()), config.optim)
    trace: Trace = {}
    for step in range(steps):
        first = step * config.data.batch_size
        sequences = [dataset.sequence(first + i) for i in range(config.data.batch_size)]
        num_labels = max(1, sum(int((s.labels != IGNORE).sum()) for s in sequences))
        loss = torch.zeros((), dtype=torch.float64)
        model = copy.deepcopy(weights).to(compute)
        for s in sequences:
            tokens, labels, *places = (np.asarray(a)[None] for a in (s.tokens, s.labels, s.positions, s.documents))
            part = model(torch.from_numpy(tokens), Places.of(*places), torch.from_numpy(labels)) / num_labels
            part.backward()
            loss += part.detach()
            _move_gradients(model, weights)
        trace[f"loss/{step}"] = loss
        gradients = {name: p.grad for name, p in weights.named_parameters() if p.grad is not None}
        trace |= {f"gradient/{step}/{name}": gradient.clone() for name, gradient in gradients.items()}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        if config.optim.clip_norm > 0:
            scale = (config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients.values():
                gradient.mul_(scale)
        optimizers.step(learning_rate_ratio(config.optim, step))
        optimizers.zero_grad()
    return trace | {f"parameter/{name}": p.detach().clone() for name, p in weights.named_parameters()}


def _move_gradients(source: Transformer, target: Transformer) -> None:
    """Adds the gradients of one model to those of another, in its dtype, and drops them."""
    for given, taken in zip(source.parameters(), target.parameters(), strict=True):
        if given.grad is not None:
            taken.grad = given.grad.to(taken.dtype) + (0 if taken.grad is None else taken.grad)
            given.grad = None


def trace_ranks(config: RunConfig, dataset: Dataset, steps: int, ranks: Ranks) -> Trace:
    """The run under its plan, by the engine that trains; every rank returns the whole trace."""
    config, _ = resolve(config, ranks)
    engine = build_engine(config, ranks)
    held = engine.held
    dtype = weights_dtype(config.optim.precision)
    trace: Trace = {}
    for step in range(steps):
        cursor = step * config.data.batch_size
        batches = micro_batches(
            dataset, cursor, config.data.batch_size, config.optim.micro_batches, ranks.data.rank(), ranks.data.size()
        )
        trace[f"loss/{step}"] = engine.forward_backward(batches)
        gradients = {name: parameter.grad for name, parameter in held.parameters().items()}
        trace |= _wholes(held, f"gradient/{step}/", gradients, dtype)
        engine.clip(engine.gradient_norm(), config.optim.clip_norm)
        engine.optimizers.step(learning_rate_ratio(config.optim, step))
        engine.optimizers.zero_grad()
    return trace | _wholes(held, "parameter/", held.parameters(), dtype)


def _wholes(held: Held, prefix: str, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Trace:
    """The tensors of all ranks, whole."""
    wholes = held.wholes([(name, tensors.get(name)) for name in held.cuts], dtype, "parity")
    return {prefix + name: whole for name, whole in zip(held.cuts, wholes, strict=True)}


def compare(trace: Trace, oracle: Trace) -> dict[str, Any]:
    """The largest relative errors of a trace, by kind, and the name of the worst.

    The error of a tensor is its largest absolute difference over its largest absolute value in the oracle.
    """
    if trace.keys() != oracle.keys():
        odd = sorted(trace.keys() ^ oracle.keys())
        raise AssertionError(f"the plan and the one process have different tensors: {odd[:5]}")
    errors = dict(_errors(trace, oracle))
    worst_name = max(errors, key=lambda name: errors[name])

    def largest(kind: str) -> float:
        return max((error for name, error in errors.items() if name.startswith(kind)), default=0.0)

    return {
        "loss_error": largest("loss/"),
        "gradient_error": largest("gradient/"),
        "parameter_error": largest("parameter/"),
        "worst_error": errors[worst_name],
        "worst_name": worst_name,
    }


def _errors(trace: Trace, oracle: Trace) -> Iterator[tuple[str, float]]:
    for name, expected in oracle.items():
        found = trace[name].double().cpu()
        difference = (found - expected.double()).abs().max()
        scale = expected.double().abs().max()
        error = float(difference / scale if scale > 0 else difference)
        # A NaN anywhere is the worst of errors, and must not vanish in a maximum.
        yield name, error if error == error else float("inf")


def main() -> int:
    """One rank: reads FOLDER/config.toml, writes the trace to FOLDER/trace.safetensors (rank 0)."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])

    def run() -> None:
        from safetensors.torch import save_file

        config = load_config(folder / "config.toml")
        with joined_ranks(config.plan, torch.device("cpu")) as ranks:
            trace = trace_ranks(config, prepare(config.data, lambda _: None), steps, ranks)
            if ranks.rank == 0:
                save_file(
                    {name: tensor.cpu().contiguous() for name, tensor in trace.items()}, folder / "trace.safetensors"
                )

    return guarded(run, debug=True)


if __name__ == "__main__":
    leave(main())
