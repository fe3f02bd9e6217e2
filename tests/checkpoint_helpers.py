"""What the tests of checkpoints share: a state that tells its step, saved and compared in full."""

import numpy as np
import torch
from safetensors.numpy import save_file

from armillary.train.checkpoint.boxes import Box
from armillary.train.checkpoint.load import load, read_facts
from armillary.train.checkpoint.local_part import whole_part
from armillary.train.checkpoint.manifest import Manifest, Shard, Stored, StoredFile, encode_manifest
from armillary.train.checkpoint.save import Checkpointer
from armillary.train.checkpoint.store import CheckpointConfig, complete, read_manifest
from armillary.train.checkpoint.verify import checksum_of, read_header, verify


def state(step):
    """A state that tells its step."""
    return {
        "model/w": torch.arange(60.0).reshape(12, 5) + step,
        "model/b": torch.full((7,), step, dtype=torch.bfloat16),
        "optimizer/step": torch.tensor(float(step)),
    }


def plain(tensors, rank=0):
    """Tensors that every rank has whole, and rank 0 writes."""
    return {name: whole_part(name, tensor, rank == 0) for name, tensor in tensors.items()}


def own_state(step, rank):
    return {"rng": torch.tensor([step, rank], dtype=torch.uint8)}


def checkpointer(folder, rank=0, num_ranks=1, attempt="a", said=None, keep=2, patience=30.0):
    report = said.append if said is not None else lambda _: None
    return Checkpointer(folder, CheckpointConfig(keep=keep), rank, num_ranks, attempt, report, patience)


def save(folder, step, content=None, **kwargs):
    """Saves and waits; returns the failure."""
    writer = checkpointer(folder, **kwargs)
    content = step if content is None else content
    writer.save(
        step,
        plain(state(content), writer.rank),
        own_state(content % 251, writer.rank),
        {"step": step, "content": content},
    )
    writer.wait()
    return writer.failure


def save_all(folder, step, num_ranks=3, **kwargs):
    """Saves from several ranks at once, each in its thread; returns every rank's failure."""
    writers = [checkpointer(folder, rank, num_ranks, **kwargs) for rank in range(num_ranks)]
    for writer in reversed(writers):
        writer.save(
            step, plain(state(step), writer.rank), own_state(step, writer.rank), {"step": step, "content": step}
        )
    for writer in writers:
        writer.wait()
    return [writer.failure for writer in writers]


def empty_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def content_of(folder, rank=0):
    """What `save` was given, loaded on as many ranks as saved it and compared in full."""
    num_ranks = read_manifest(folder).num_ranks
    content = read_facts(folder)["content"]
    expected, expected_own = state(content), own_state(content % 251, rank)
    found, own = empty_like(expected), empty_like(expected_own)
    load(folder, plain(found), own, rank, num_ranks)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(own["rng"], expected_own["rng"])
    return content


def flip_bit(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def newest_verified(checkpoints, report):
    """What one rank would resume from; each checkpoint that is passed over is reported. None if there is none."""
    for folder in complete(checkpoints):
        problems = verify(folder)
        if not problems:
            return folder
        report(f"{folder.name}: {'; '.join(problems)}")
    return None


def numpy_checkpoint(folder, step, value=0.0):
    """A checkpoint written without ours: of two ranks, `model/w` split between them, `model/b` on the first."""
    folder.mkdir(parents=True)
    weight = np.arange(20, dtype=np.float32).reshape(5, 4) + value
    held = [
        {"model/w": (Box((0, 0), (3, 4)), weight[:3]), "model/b": (Box((), ()), np.array(step))},
        {"model/w": (Box((3, 0), (2, 4)), weight[3:])},
    ]
    files, shards = {}, {}
    for rank, tensors in enumerate(held):
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file({name: array.copy() for name, (_, array) in tensors.items()}, path)
        with open(path, "rb") as file:
            entries, header = read_header(file, path.stat().st_size)
            files[path.name] = StoredFile(path.stat().st_size, header)
            for name, (box, _) in tensors.items():
                checksum = checksum_of(file, entries[name].start, entries[name].num_bytes)
                shards.setdefault(name, []).append(Shard(path.name, box, checksum))
    tensors = {
        "model/w": Stored("F32", (5, 4), tuple(shards["model/w"])),
        "model/b": Stored("I64", (), tuple(shards["model/b"])),
    }
    (folder / "manifest.json").write_bytes(encode_manifest(Manifest(step, 2, {"step": step}, files, tensors)))
    return folder
