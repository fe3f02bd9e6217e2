"""The state of a run as named tensors, and the way back to it from a checkpoint that all ranks found sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from armillary.parallel.held import Held, local
from armillary.parallel.mesh import Ranks
from armillary.train.checkpoint.boxes import Box, whole
from armillary.train.checkpoint.load import load
from armillary.train.checkpoint.local_part import DTYPE_NAMES, Local
from armillary.train.checkpoint.store import complete
from armillary.train.checkpoint.verify import verify
from armillary.train.data.dataset import Dataset
from armillary.train.optim.optimizers import Optimizers
from armillary.train.words import few


def shared_state(held: Held, optimizers: Optimizers) -> dict[str, Local]:
    """This rank's part of weights and optimizer state: what the ranks hold together, whatever their number and plan."""
    # A gathered copy in the compute dtype must never pass for the weights.
    for stage in held.stages:
        assert not isinstance(stage, FSDPModule) or all(isinstance(p, DTensor) for p in stage.parameters())
    tensors: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in held.parameters().items()}
    return {name: _part(held, name, tensor) for name, tensor in (tensors | optimizers.state_tensors()).items()}


def _part(held: Held, name: str, tensor: Tensor) -> Local:
    """Where a tensor lies that belongs to a parameter: shaped and sharded as it, or a count that all ranks have."""
    parameter = parameter_of(name)
    dtype, data = DTYPE_NAMES[tensor.dtype], local(tensor).detach()
    if tensor.ndim == 0:
        speaks = held.ranks.stage.rank() == 0
        return Local(dtype, (), whole(()), data, speaks)
    return Local(dtype, held.cuts[parameter].shape, Box(*held.box(parameter)), data, held.speaks(parameter))


def parameter_of(name: str) -> str:
    """Of `model/<parameter>` or `optimizer/<key>/<parameter>`, the parameter."""
    return name.rsplit("/", 1)[-1]


def own_state() -> dict[str, Tensor]:
    """What each rank has for itself: the state of its random generators."""
    state = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def load_state(path: Path, held: Held, optimizers: Optimizers) -> dict[str, Any]:
    """Fills model, optimizers and random generators from a checkpoint; returns the facts saved with it.

    Raises:
        ValueError: on all ranks, if one finds that it is a checkpoint of another model, or cannot read it.
    """
    optimizers.create_state()
    own = own_state()
    facts = _load_together(path, held, shared_state(held, optimizers), own, ("model/", "optimizer/"))
    torch.set_rng_state(own["rng/cpu"])
    if "rng/cuda" in own:
        torch.cuda.set_rng_state(own["rng/cuda"])
    return facts


def load_weights(path: Path, held: Held) -> dict[str, Any]:
    """Fills the model alone; otherwise as `load_state`."""
    shared = {f"model/{name}": _part(held, name, parameter) for name, parameter in held.parameters().items()}
    return _load_together(path, held, shared, {}, ("model/",))


def _load_together(
    path: Path, held: Held, shared: dict[str, Local], own: dict[str, Tensor], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """`load` on every rank, all of which go on, or none. What is of other kinds is left alone."""
    ranks, here = held.ranks, held.parameters()

    def elsewhere(name: str) -> bool:
        others = parameter_of(name) in held.cuts and parameter_of(name) not in here
        return others or not name.startswith(kinds)

    facts: dict[str, Any] = {}
    problem = ""
    try:
        facts = load(path, shared, own, ranks.rank, ranks.num_ranks, elsewhere)
    except (ValueError, OSError) as error:
        problem = str(error)
    # What differs may lie on one rank alone: the others would wait for it for ever.
    finder = ranks.largest(ranks.rank if problem else -1)
    if finder >= 0:
        raise ValueError(ranks.agree(problem, source=finder))
    held.update_twins()
    return facts


@torch.no_grad()
def weights_are_finite(held: Held) -> bool:
    """Whether every weight that this rank holds is a finite number."""
    weights = map(local, held.parameters().values())
    return all(bool(torch.isfinite(weight.sum()) or torch.isfinite(weight).all()) for weight in weights)


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
