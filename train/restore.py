"""The state of a run as named tensors, and the way back to it from a checkpoint that all ranks found sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from armillary.parallel.mesh import Ranks
from armillary.train.checkpoint_read import load
from armillary.train.data import Dataset
from armillary.train.model import Transformer
from armillary.train.optim import Optimizers
from armillary.train.shards import few
from armillary.train.store import complete, verify


def shared_state(model: Transformer, optimizers: Optimizers) -> dict[str, Tensor]:
    """Weights and optimizer state: what the ranks hold together, whatever their number."""
    weights: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    # A gathered copy in the compute dtype must never pass for the weights.
    assert all(isinstance(weight, DTensor) for weight in weights.values()) or not isinstance(model, FSDPModule)
    return weights | optimizers.state_tensors()


def own_state() -> dict[str, Tensor]:
    """What each rank has for itself: the state of its random generators."""
    state = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def load_state(path: Path, model: Transformer, optimizers: Optimizers, ranks: Ranks) -> dict[str, Any]:
    """Fills model, optimizers and random generators from a checkpoint; returns the facts saved with it.

    Raises:
        ValueError: if it is a checkpoint of another model.
    """
    optimizers.create_state()
    own = own_state()
    facts = load(path, shared_state(model, optimizers), own, ranks.rank, ranks.num_ranks)
    torch.set_rng_state(own["rng/cpu"])
    if "rng/cuda" in own:
        torch.cuda.set_rng_state(own["rng/cuda"])
    return facts


@torch.no_grad()
def weights_are_finite(model: Transformer) -> bool:
    """Whether every weight that this rank holds is a finite number."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(bool(torch.isfinite(weight.sum()) or torch.isfinite(weight).all()) for weight in held)


def check_same_data(path: Path, facts: dict[str, Any], dataset: Dataset) -> None:
    """Refuses a checkpoint that was trained on other data.

    Raises:
        ValueError: naming the keys that may have changed.
    """
    if facts["data"] != dataset.fingerprint:
        raise ValueError(
            f"{path}: was trained on other data than the config names (data.sources, data.tokenizer, "
            "data.sequence_length, data.held_out or data.seed changed, or a file did); put the old ones back, or "
            "start a new run"
        )


def newest_sound(folder: Path, ranks: Ranks, note: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in which no rank found a fault; each checks its share of the files.

    A faulty one is named, with its faults, and the one before it is tried. None if there are no checkpoints.

    Raises:
        ValueError: if there are some, and all are faulty: a new start would in time remove what may be mended.
    """
    found = "\n".join(path.name for path in complete(folder)) if ranks.rank == 0 else ""
    names = ranks.agree(found).split()
    for name in names:
        problems = verify(folder / name, slice(ranks.rank, None, ranks.num_ranks))
        finder = ranks.largest(ranks.rank if problems else -1)
        if finder < 0:
            return folder / name
        note(f"{folder / name} is not sound and is passed over: {ranks.agree(few(problems), source=finder)}")
    if names:
        raise ValueError(
            f"{folder}: has {len(names)} checkpoints, and none of them is sound; mend them, or move them away to start "
            "again from the first step"
        )
    return None
