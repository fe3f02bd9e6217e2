"""Weights written file by file, so that only a part is in memory: as a checkpoint, or as transformers loads them."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.train.checkpoint.local_part import whole_part
from armillary.train.checkpoint.manifest import encode_manifest, merge_parts
from armillary.train.checkpoint.save import Snapshot, write_tensors
from armillary.train.checkpoint.store import publish, step_name
from armillary.train.files import write_aside, write_json
from armillary.train.huggingface.families import their_name
from armillary.train.huggingface.source import INDEX

PART_BYTES = 1 << 28
"""Of one file of a checkpoint: what is in memory at a time."""
SHARD_BYTES = 5_000_000_000
"""Of one file for transformers, at most, as on Hugging Face's hub."""

Shapes = Mapping[str, tuple[int, ...]]


def write_checkpoint(
    checkpoints: Path, shapes: Shapes, read: Callable[[str], Tensor], facts: Mapping[str, Any]
) -> Path:
    """A checkpoint of step 0 with weights alone, in files as ranks would write them; returns its folder."""
    unfinished = checkpoints / f"{step_name(0)}.tmp-import-1"
    unfinished.mkdir(parents=True)
    parts = []
    for number, names in enumerate(in_groups(shapes, 4, PART_BYTES)):
        data = {f"model/{name}": read(name) for name in names}
        local = {name: whole_part(name, tensor) for name, tensor in data.items()}
        snapshot = Snapshot(0, 1, unfinished, local, data, facts)
        parts.append(write_tensors(unfinished / f"rank-{number:05d}.safetensors", snapshot, num_ranks=1))
    write_aside(unfinished / "manifest.json", encode_manifest(merge_parts(parts)))
    published = publish(unfinished, 0)
    write_aside(checkpoints / "latest", f"{published.name}\n".encode())
    return published


def write_tensor_files(
    folder: Path, shapes: Shapes, read: Callable[[str], Tensor], itemsize: int, shard_bytes: int
) -> None:
    """`model.safetensors`, or several files and their index; one file's tensors are in memory at a time."""
    from safetensors.torch import save_file

    groups = list(in_groups(shapes, itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file({their_name(name): read(name) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library lets no one else read
        with open(folder / file, "rb") as written:
            os.fsync(written.fileno())
        weight_map |= {their_name(name): file for name in names}
    if len(groups) > 1:
        total = sum(itemsize * torch.Size(shape).numel() for shape in shapes.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def in_groups(shapes: Shapes, itemsize: int, most: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `most` bytes, or of one tensor that is larger."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if group and size + num_bytes > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group
