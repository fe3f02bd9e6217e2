"""One case of the parity matrix, judged: a plan on its ranks against one process.

In float64 every tensor is held against the oracle's, and rounding cannot hide a mistake. In bfloat16 it could, so there
the yardstick is what one process loses: both are held against the float64 oracle, and the plan may be off by at most
twice as much. The error of a kind is the root mean square, over its tensors and steps, of each tensor's relative error
(norm of the difference over norm of the oracle): so neither the largest tensor decides alone nor the one with the
smallest values. Gradients of the first step are a kind of their own. There rounding makes about 0.01, and a tensor that
is wrong as a whole adds 1 over the root of the number of tensors, about 0.15; later, AdamW has turned roundings into
steps of other signs, which makes about 0.1.

A loss is one number, in which the errors of hundreds of tokens cancel, on one process by chance to nearly nothing. So
its yardstick is at least what cancelling leaves of one rounding of each token's loss: 2^-9 over the root of their
number.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from armillary.parallel.mesh import Ranks
from armillary.train.config.run_config import RunConfig
from armillary.train.data.cache import digest
from armillary.train.data.dataset import Dataset
from armillary.train.proof.matrix import ALLOWED, LENGTHS, STEPS, Case, config_of
from armillary.train.proof.parity import Trace, compare, trace_one_process, trace_ranks
from armillary.train.proof.specimen import specimen

KINDS = {"loss": "loss/", "first gradient": "gradient/0/", "gradient": "gradient/", "parameter": "parameter/"}
"""What tensors of a trace are named that count as one."""


def dataset_of(case: Case) -> Dataset:
    """What a case reads."""
    return specimen(config_of(case).data, LENGTHS[case["documents"]])


def judge(case: Case, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Runs a case on its ranks, all of which call this; the result is complete on rank 0.

    Args:
        folder: keeps the traces of one process, which many cases share.

    Returns:
        `error`, `worst` (the tensor or the kind), `errors` (of each kind), `allowed` and `ok`.
    """
    config, dataset = config_of(case), dataset_of(case)
    trace = trace_ranks(config, dataset, STEPS, ranks)
    if ranks.rank != 0:
        return {}
    errors, worst = measure(trace, config, dataset, folder)
    error, allowed = max(errors.values()), ALLOWED[config.optim.precision]
    return {"error": error, "worst": worst, "errors": errors, "allowed": allowed, "ok": error <= allowed}


def measure(trace: Trace, config: RunConfig, dataset: Dataset, folder: Path) -> tuple[dict[str, float], str]:
    """The errors of a trace by kind, as `ALLOWED` counts them, and what has the worst."""
    one = _kept(config, dataset, folder)
    if config.optim.precision == "float64":
        found = compare(trace, one)
        return {kind: found[f"{kind}_error"] for kind in ("loss", "gradient", "parameter")}, found["worst_name"]
    wide = _kept(replace(config, optim=replace(config.optim, precision="float64")), dataset, folder)
    ratios = {kind: error_of(trace, wide, kind) / _yardstick(one, wide, kind, config) for kind in KINDS}
    return ratios, max(KINDS, key=lambda kind: ratios[kind])


def _yardstick(one: Trace, wide: Trace, kind: str, config: RunConfig) -> float:
    lost = error_of(one, wide, kind)
    tokens = config.data.batch_size * config.data.sequence_length
    return max(lost, 2**-9 / tokens**0.5) if kind == "loss" else lost


def error_of(trace: Trace, oracle: Trace, kind: str) -> float:
    """The error of a kind, infinite if something is not a number."""
    errors = [
        (trace[name].double() - expected.double()).norm() / expected.double().norm()
        for name, expected in oracle.items()
        if name.startswith(KINDS[kind])
    ]
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
        aside = path.with_suffix(f".{os.getpid()}.part")
        save_file({key: tensor.contiguous() for key, tensor in make().items()}, aside)
        aside.rename(path)
    return load_file(path)
