"""Loading a checkpoint on any number of ranks.

`load` fills tensors in place and reads only the pieces that this rank holds; there is no other way to load, so a run on
the same ranks is the simplest case of resharding. (torch's DCP would do this too, but its planner sends pickled objects
between ranks and its metadata is a pickle.)
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armillary.train.checkpoint.local_part import DTYPES, Local, owner, whole_part
from armillary.train.checkpoint.manifest import Manifest, Stored, reads
from armillary.train.checkpoint.store import read_manifest
from armillary.train.files import safe_join
from armillary.train.words import few


def load(
    folder: Path,
    shared: Mapping[str, Local],
    own: Mapping[str, Tensor],
    rank: int,
    num_ranks: int,
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Fills the given tensors in place from a checkpoint that any number of ranks saved, however sharded.

    Reads only the pieces that this rank holds. The bytes are not checked again: `verify` comes first.

    Args:
        folder: a `step-*` folder.
        shared: this rank's parts; their names, global shapes and dtypes must be those of the checkpoint. Which rank
            writes what does not matter here.
        own: this rank's own state; left as it is if the checkpoint is from another number of ranks, or from ranks
            with other state of their own (a GPU's generator, say).
        rank, num_ranks: of this run.
        elsewhere: whether a tensor of a name that is not in `shared` is another rank's to load.

    Returns:
        The facts that were saved.

    Raises:
        ValueError: if the checkpoint is damaged, or is not of these tensors; nothing has been changed then, unless a
            file is found to differ from the manifest on the way.
    """
    manifest = read_manifest(folder)
    kept = {name for name in manifest.tensors if owner(name) == rank}
    same = num_ranks == manifest.num_ranks and kept == {f"rank-{rank}/{name}" for name in own}
    owners = (None, rank) if same else (None,)
    mine = {f"rank-{rank}/{name}": tensor for name, tensor in own.items() if rank in owners}
    targets = dict(shared) | {name: whole_part(name, tensor) for name, tensor in mine.items()}
    stored = {
        name: it
        for name, it in manifest.tensors.items()
        if owner(name) in owners and (name in targets or not elsewhere(name))
    }
    _check_same(folder, targets, stored)
    _fill(folder, manifest, targets)
    return dict(manifest.facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint. Raises ValueError if its manifest cannot be used."""
    return dict(read_manifest(folder).facts)


def read_full(folder: Path, name: str) -> Tensor:
    """One whole tensor, in host memory.

    Raises:
        ValueError: if the checkpoint is damaged or has no such tensor.
    """
    manifest = read_manifest(folder)
    if name not in manifest.tensors:
        raise ValueError(f"{folder}: has no tensor {name!r}; it has {few([repr(n) for n in manifest.tensors])}")
    stored = manifest.tensors[name]
    _check_sizes(folder, manifest, {shard.file for shard in stored.shards})
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    _fill(folder, manifest, {name: whole_part(name, tensor)})
    return tensor


def _check_same(folder: Path, targets: Mapping[str, Local], stored: Mapping[str, Stored]) -> None:
    """Refuses a checkpoint of other tensors."""
    wrong = [f"{name!r} is not in the checkpoint" for name in targets if name not in stored]
    wrong += [f"{name!r} is only in the checkpoint" for name in stored if name not in targets]
    wrong += [
        f"{name!r} is {local.dtype} {local.shape} here and {stored[name].dtype} {stored[name].shape} in the checkpoint"
        for name, local in targets.items()
        if name in stored and (local.dtype, local.shape) != (stored[name].dtype, stored[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"{folder} is not of this model and optimizer: {few(wrong, most=4)}. Use the config of the run that saved "
            "it, or start a new run"
        )


def _check_sizes(folder: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Refuses missing and cut files before anything is allocated or mapped."""
    for name in sorted(files):
        path = safe_join(folder, name)
        size = path.stat().st_size if path.is_file() else -1
        if size != manifest.files[name].size:
            found = "is missing" if size < 0 else f"has {size} bytes, not {manifest.files[name].size}"
            raise ValueError(f"{path} {found}; use an older checkpoint")


def _fill(folder: Path, manifest: Manifest, targets: Mapping[str, Local]) -> None:
    """Copies every piece that lies in a target's box, one file open at a time."""
    wanted = reads(manifest, {name: target.box for name, target in targets.items()})
    _check_sizes(folder, manifest, wanted)
    for file_name, items in wanted.items():
        path = safe_join(folder, file_name)
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                for name, shard, box in items:
                    target, stored = targets[name], file.get_slice(name)
                    if (stored.get_dtype(), tuple(stored.get_shape())) != (target.dtype, shard.box.sizes):
                        raise ValueError(f"{path}: holds {name!r} otherwise than the manifest says")
                    data = stored[box.slices(shard.box)] if box.sizes else file.get_tensor(name)
                    target.data[box.slices(target.box)].copy_(data)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); use an older checkpoint") from error
