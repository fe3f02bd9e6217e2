"""One case of the parity matrix, judged: a plan on its ranks against one process.

In float64 every tensor is held against the oracle's, and rounding cannot hide a mistake. In bfloat16 it could, so there
the yardstick is what one process loses: both are held against the float64 oracle, and the plan may be off by at most
twice as much. The error of a kind (loss, gradients, parameters) is the root mean square, over its tensors and steps, of
each tensor's relative error (norm of the difference over norm of the oracle). So neither the largest tensor nor the one
with the smallest values decides alone, and a tensor that is wrong as a whole adds 1 over the root of their number,
about 0.1, where rounding makes 0.01.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from armillary.parallel.mesh import Ranks
from armillary.train.cache import digest
from armillary.train.config import RunConfig
from armillary.train.data import Dataset
from armillary.train.matrix import LENGTHS, STEPS, Case, config_of
from armillary.train.parity import Trace, compare, trace_one_process, trace_ranks
from armillary.train.specimen import specimen

KINDS = ("loss", "gradient", "parameter")

ALLOWED = {"float64": 1e-9, "bfloat16": 2.0}
"""Of the worst relative error; of the worst ratio to the error of one process."""


def dataset_of(case: Case) -> Dataset:
    """What a case reads."""
    return specimen(config_of(case).data, LENGTHS[case["documents"]])


def judge(case: Case, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Runs a case on its ranks, all of which call this; the result is complete on rank 0.

    Args:
        folder: keeps the traces of one process, which many cases share.

    Returns:
        `error`, `worst` (the tensor or the kind), `allowed` and `ok`.
    """
    config, dataset = config_of(case), dataset_of(case)
    trace = trace_ranks(config, dataset, STEPS, ranks)
    if ranks.rank != 0:
        return {}
    error, worst = measure(trace, config, dataset, folder)
    allowed = ALLOWED[config.optim.precision]
    return {"error": error, "worst": worst, "allowed": allowed, "ok": error <= allowed}


def measure(trace: Trace, config: RunConfig, dataset: Dataset, folder: Path) -> tuple[float, str]:
    """The worst error of a trace, as `ALLOWED` counts it, and what has it."""
    one = _kept(config, dataset, folder)
    if config.optim.precision == "float64":
        found = compare(trace, one)
        return found["worst_error"], found["worst_name"]
    wide = _kept(replace(config, optim=replace(config.optim, precision="float64")), dataset, folder)
    ratios = {kind: _error(trace, wide, kind) / _error(one, wide, kind) for kind in KINDS}
    worst = max(KINDS, key=lambda kind: ratios[kind])
    return ratios[worst], worst


def _error(trace: Trace, oracle: Trace, kind: str) -> float:
    errors = []
    for name, expected in oracle.items():
        if name.startswith(f"{kind}/"):
            difference = (trace[name].double() - expected.double()).norm() / expected.double().norm()
            errors.append(difference)
    error = float(torch.stack(errors).square().mean().sqrt())
    return error if error == error else float("inf")


def _kept(config: RunConfig, dataset: Dataset, folder: Path) -> Trace:
    """The trace of one process, from the folder if it is there."""
    return keep(
        folder,
        digest(asdict(config.model), asdict(config.optim) | {"micro_batches": 0}, dataset.fingerprint),
        lambda: trace_one_process(config, dataset, STEPS),
    )


def keep(folder: Path, name: str, make: Callable[[], Trace]) -> Trace:
    """What is in the folder under a name, made if it is not there."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        aside = path.with_suffix(f".{id(make)}.part")
        save_file({key: tensor.contiguous() for key, tensor in make().items()}, aside)
        aside.rename(path)
    return load_file(path)
